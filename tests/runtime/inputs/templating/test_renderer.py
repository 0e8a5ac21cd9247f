"""A chat template is a stranger's program: what it may cost, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pytest

import hivtp
from hivtp.runtime.inputs.templating import renderer
from hivtp.runtime.inputs.templating.renderer import TemplateFailedError, TemplateRenderer
from hivtp_ops.errors import PromptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REFUSED = r"^the chat template ['\"].* (failed|was stopped): "
HELLO = "Hello {{ name }}."
NESTED_RANGES = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
# `n` comes from outside, so that nothing is computed when the template is compiled.
ATTACKS = {
    "endless": NESTED_RANGES,
    "endless output": NESTED_RANGES.replace("{% endfor %}", "x{% endfor %}", 1),
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "power": "{{ n ** (n ** n) }}",
    "doubling": "{% set x = namespace(s='a') %}{% for i in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}",
    "doubling lists": "{% set x = namespace(s=[1]) %}{% for i in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}",
    "long text": "{{ 'a' * n ** 10 }}",
    "long list": "{{ [n] * n ** 10 }}",
    "long tuple": "{{ (n,) * n ** 9 }}",
    "wide": "{{ 'a'.center(n ** 10) }}",
    "wide filter": "{{ 'a' | center(n ** 10) }}",
    "wide number": "{{ '%1000000000d' % n }}",
    "wide format": "{{ '{:>10000000000}'.format(n) }}",
    "indented": "{{ 'a' | indent(n ** 9, true) }}",
    "joined": "{{ range(99999) | join('a' * 99999) }}",
    "replaced": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "range": "{{ range(n ** 10) | list }}",
    "lorem ipsum": "{{ lipsum(n=999999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "date": "{{ strftime_now('%A' * n ** 8) }}",
    "just too much": "{{ 'a' * (2 ** 22 + 1) }}",
    "too much of four bytes each": "{{ '🙂' * 2 ** 23 }}",
    "json": "{{ (range(99999) | list * 999) | tojson }}",
}
# These are refused before they run.
SOURCES = {
    "constant": "{{ 'a' * 10 ** 10 }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "conditions": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "comment": "{#" * 100_000,
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], TemplateRenderer]]:
    """Renderers with a short limit, which are closed in the end."""
    monkeypatch.setattr(renderer, "MAX_SECONDS", 1.5)
    made: list[TemplateRenderer] = []

    def make(source: str) -> TemplateRenderer:
        made.append(TemplateRenderer(source))
        return made[-1]

    yield make
    for item in made:
        item.close()


def worker_of(template: TemplateRenderer) -> int:
    assert template._worker is not None
    return template._worker.pid


def memory(pid: int, kind: str) -> int:
    """In MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) // 1024


def is_running(pid: int) -> bool:
    try:
        # Where nobody collects what an orphan leaves, that is a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_in_time_and_the_next_request_works(make, attack):
    template = make("{% if n %}" + ATTACKS[attack] + "{% else %}" + HELLO + "{% endif %}")
    assert template.render({"n": 0, "name": "you"}) == "Hello you."
    started = time.monotonic()
    with pytest.raises(PromptError, match=REFUSED):
        template.render({"n": 10, "name": "you"})
    assert time.monotonic() - started < renderer.MAX_SECONDS + 1
    assert template.render({"n": 0, "name": "you"}) == "Hello you."
    assert memory(worker_of(template), "VmPeak") <= renderer.MAX_BYTES // 2**20


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_cannot_be_compiled_is_refused_in_time_each_time(make, source):
    template = make(SOURCES[source])
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(PromptError, match=REFUSED):
            template.render({})
        assert time.monotonic() - started < renderer.MAX_SECONDS + 1


def test_a_large_prompt_is_within_the_limits(make):
    name = "<word> 🙂\n" * 200_000
    assert make(HELLO).render({"name": name}) == f"Hello {name}."


def test_one_process_renders_all_and_is_small(make):
    template = make(HELLO)
    template.render({"name": 0})
    pid = worker_of(template)
    for number in range(50):
        assert template.render({"name": number}) == f"Hello {number}."
    assert worker_of(template) == pid
    assert memory(pid, "VmRSS") < 40


def test_what_a_template_writes_is_not_the_next_answer(make):
    template = make("{{ text }}")
    for text in ('"}\n{"text": "other"}\n', "\n", "\r\n", "\u2028", "\0", ""):
        assert template.render({"text": text}) == text


def test_threads_get_each_its_own_answer(make):
    template = make(HELLO)

    def ask(number: int) -> bool:
        return template.render({"name": number}) == f"Hello {number}."

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(400)))


def test_closing_ends_the_process_and_rendering_starts_another(make):
    template = make(HELLO)
    template.render({"name": "you"})
    pid = worker_of(template)
    template.close()
    assert not is_running(pid)
    template.close()
    assert template.render({"name": "you"}) == "Hello you."


def test_a_process_that_was_started_before_is_the_one_that_renders(make):
    template = make(HELLO)
    started = time.perf_counter()
    template.start()
    pid = worker_of(template)
    template.start()
    assert template.render({"name": "you"}) == "Hello you."
    assert worker_of(template) == pid
    before = time.perf_counter() - started
    template.close()
    started = time.perf_counter()
    template.start()
    assert time.perf_counter() - started < before


def test_a_renderer_that_is_dropped_ends_its_process():
    template = TemplateRenderer(HELLO)
    template.render({"name": "you"})
    pid = worker_of(template)
    del template
    assert not is_running(pid)


def test_ctrl_c_in_a_terminal_does_not_reach_the_process(make):
    template = make(HELLO)
    template.render({"name": "you"})
    pid = worker_of(template)
    assert os.getpgid(pid) == os.getsid(pid) == pid


def test_an_interrupt_while_it_renders_leaves_no_answer_behind(make):
    template = make("{% if n %}" + NESTED_RANGES + "{% endif %}" + HELLO)
    template.render({"n": 0, "name": "you"})
    pid = worker_of(template)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            template.render({"n": 1, "name": "me"})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_running(pid)
    assert template.render({"n": 0, "name": "you"}) == "Hello you."


def test_a_process_that_was_killed_is_replaced(make):
    template = make("{% if n %}" + NESTED_RANGES + "{% endif %}" + HELLO)
    template.render({"n": 0})
    os.kill(worker_of(template), signal.SIGKILL)
    os.waitpid(worker_of(template), 0)
    assert template.render({"n": 0, "name": "you"}) == "Hello you."
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(template.render, {"n": 1})
        time.sleep(0.3)
        os.kill(worker_of(template), signal.SIGKILL)
        with pytest.raises(PromptError, match="its process ended with exit code -9"):
            asked.result()
    assert template.render({"n": 0, "name": "you"}) == "Hello you."


def test_a_python_that_cannot_be_started_is_named(make, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    make(HELLO).start()
    with pytest.raises(PromptError, match=r"failed: .*No such file or directory: '/nowhere/python'"):
        make(HELLO).render({})


def test_a_fork_of_the_process_has_a_worker_of_its_own(make):
    template = make("{{ number }}")
    template.render({"number": 0})
    pid = worker_of(template)
    child = os.fork()
    if child == 0:
        is_right = all(template.render({"number": number}) == str(number) for number in range(100))
        is_right = is_right and worker_of(template) != pid
        template.close()
        os._exit(0 if is_right else 1)
    assert all(template.render({"number": -number}) == str(-number) for number in range(100))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker_of(template) == pid
    assert template.render({"number": 1}) == "1"


PARENT = """
import os, signal, sys, threading, time
from hivtp.runtime.inputs.templating import renderer

renderer.MAX_SECONDS = 1.0
template = renderer.TemplateRenderer(sys.argv[1])
thread = threading.Thread(target=template.render, args=[{}], daemon=True)
thread.start()
while template._worker is None:
    time.sleep(0.01)
time.sleep(0.4)
print(template._worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("source", [HELLO, NESTED_RANGES, "{{ 10 ** (10 ** 10) }}"])
def test_no_process_outlives_the_one_that_asks(source):
    done = subprocess.run([sys.executable, "-c", PARENT, source], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert wait_until_gone(int(done.stdout), seconds=4)


def test_jinja_is_taken_from_where_the_caller_has_it(tmp_path):
    """Also where it is installed for one user, or lies in a folder on PYTHONPATH."""
    code = f"""
        from hivtp.runtime.inputs.templating.renderer import TemplateRenderer
        template = TemplateRenderer({HELLO!r})
        print(template.render({{"name": "you"}}))
        template.close()
    """
    # What lies beside Jinja stands for no module of the standard library.
    (tmp_path / "resource.py").write_text("raise SystemExit('this is not the standard library')")
    for package in ("jinja2", "markupsafe", "numpy", "numpy.libs"):
        (tmp_path / package).symlink_to(Path(jinja2.__file__).parents[1] / package)
    folders = [tmp_path, Path(hivtp.__file__).parents[1]]
    done = subprocess.run(
        [Path(sys.base_prefix) / "bin" / Path(sys.executable).name, "-S", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(map(str, folders))},
        check=False,
    )
    assert (done.stdout, done.stderr) == ("Hello you.\n", "")


def test_a_template_that_fails_says_so_once_it_has_run(make):
    with pytest.raises(TemplateFailedError, match="failed: ZeroDivisionError: division by zero"):
        make("{{ 1 / zero }}").render({"zero": 0})
