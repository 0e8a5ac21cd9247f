from __future__ import annotations

from hivtp.engines.tensorrt.progress import BuildProgress


def test_phases_within_phases_make_one_percentage_that_never_falls():
    progress = BuildProgress()
    seen = []

    def note() -> None:
        seen.append(progress.percent)

    progress.start("build", None, 4)
    progress.start("parse", "build", 10)
    for _ in range(10):
        progress.step("parse")
        note()
    progress.finish("parse")
    progress.step("build")
    note()
    # TensorRT announces a phase anew under the same name.
    for _ in range(2):
        progress.start("time", "build", 2)
        progress.step("time")
        note()
        progress.finish("time")
    progress.finish("build")
    note()
    assert seen == sorted(seen)
    assert seen[:2] == [2, 5]
    assert seen[9:] == [25, 25, 37, 37, 100]


def test_steps_that_were_not_announced_or_are_too_many_do_no_harm():
    progress = BuildProgress()
    progress.step("unknown")
    progress.finish("unknown")
    progress.start("build", None, 0)
    for _ in range(5):
        progress.step("build")
    assert progress.percent == 100
