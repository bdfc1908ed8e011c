"""Files that appear whole or not at all, locks, and the cache's place."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tmc_export.core.cache import cache_bytes, cache_folder
from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.files import write_whole
from tmc_export.core.locks import held, try_lock


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, "one é")
    write_whole(path, b"two", 0o755)
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o755 and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "x"
    write_whole(path, "before")

    def full(*args: object) -> None:
        if where == "write_bytes":
            with open(str(args[0]), "wb") as file:
                file.write(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Path, "write_bytes") if where == "write_bytes" else (os, "replace")), full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, "after")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_a_lock_is_held_by_one_and_given_back_by_a_killed_one(tmp_path: Path) -> None:
    path, said = tmp_path / "lock", list[str]()
    code = (
        "import sys, time; from pathlib import Path; from tmc_export.core.locks import held\n"
        "with held(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "\n"
    with path.open() as file:
        assert try_lock(file.fileno()) is False
    threading.Timer(0.1, other.kill).start()
    with held(path, lambda: said.append("waits")):
        assert said == ["waits"]
    other.wait()
    with held(path, lambda: said.append("waits")), path.open() as file:
        assert said == ["waits"] and try_lock(file.fileno()) is False
    with path.open() as file:
        assert try_lock(file.fileno()) is True


def test_a_lock_file_that_is_removed_while_one_waits_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert try_lock(file.fileno())

        def waiting() -> None:
            path.unlink()
            threading.Timer(0.1, file.close).start()

        with held(path, waiting):
            assert path.is_file()
            with path.open() as again:
                assert try_lock(again.fileno()) is False


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMC_EXPORT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "tmc-export"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "tmc-export"
    monkeypatch.setenv("TMC_EXPORT_CACHE_DIR", "~/mine")
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize(("text", "size"), [("", 16 << 30), ("0", 0), ("0.5", 1 << 29)])
def test_how_much_it_may_take(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("TMC_EXPORT_CACHE_GIB", text)
    assert cache_bytes() == size


@pytest.mark.parametrize("text", ["much", "-1", "nan", "1e99"])
def test_a_limit_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TMC_EXPORT_CACHE_GIB", text)
    with pytest.raises(RuntimeInputError, match=f"TMC_EXPORT_CACHE_GIB={text}"):
        cache_bytes()
