"""Files of results, and what is printed: wherever they lead, and whatever the encoding."""

import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tokendance.errors import ConfigError
from tokendance.results import check_writable, write_result

ADVICE = "Give another path."
ASCII = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path, link = tmp_path / "real.json", tmp_path / "link.json"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    check_writable(link, ADVICE)
    assert path.read_text() == "old"
    write_result(link, "käse 🧀 \ud83d", ADVICE)
    assert path.read_bytes() == "käse 🧀 \\ud83d".encode()
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"File too large\. Give another path"):
            write_result(link, "x" * 101, ADVICE)
        with pytest.raises(ConfigError, match="File too large"):
            check_writable(tmp_path / "new.json", ADVICE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == "käse 🧀 \\ud83d".encode()
    assert names(tmp_path) == ["link.json", "real.json"]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for path in (Path("/dev/full"), tmp_path, tmp_path / "no" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written: .*\. Give another path\."):
            check_writable(path, ADVICE)
    with pytest.raises(ConfigError, match="No space left"):
        write_result(Path("/dev/full"), "{}", ADVICE)
    assert names(tmp_path) == []


def test_a_link_that_leads_to_itself_is_told_in_a_sentence(tmp_path: Path) -> None:
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(ConfigError, match="symbolic links"):
        check_writable(link, ADVICE)


def test_devices_and_pipes_are_written_as_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_writable(Path("/dev/null"), ADVICE)
    write_result(Path("/dev/null"), "{}", ADVICE)
    assert Path("/dev/null").is_char_device()
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    check_writable(pipe, ADVICE)  # does not wait for a reader
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_result(pipe, "{}", ADVICE)
    reader.join(60)
    assert read == ["{}"]
    print("before")
    check_writable(Path("/dev/stdout"), ADVICE)
    write_result(Path("/dev/stdout"), "{}\n", ADVICE)
    print("after")
    assert capfd.readouterr().out == "before\n{}\nafter\n"


def test_an_encoding_that_lacks_a_letter_costs_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tokendance.commands.streams import standard_streams\n"
        "from tokendance.results import write_result\n"
        "with standard_streams():\n"
        "    print('k\\u00e4se')\n"
        "    write_result(Path(sys.argv[1]), 'k\\u00e4se', '')\n"
    )
    path = tmp_path / "x.json"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=ASCII, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"k\\xe4se\n", b"")
    assert path.read_text(encoding="utf-8") == "käse"


def test_output_that_leads_nowhere_is_told_in_a_sentence() -> None:
    command = Path(sys.executable).with_name("tokendance")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "Standard output cannot be written: No space left on device. Send it" in said
    assert "Traceback" not in said
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [command, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
