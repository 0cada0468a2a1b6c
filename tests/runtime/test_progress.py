import io

import pytest

from deepgemm_jax._progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream, shown", [(Terminal(), True), (io.StringIO(), False)])
def test_a_bar_is_for_terminals(stream, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("compile", 3) as progress:
        progress.advance("first")
        progress.print("a line")
        progress.advance()
    assert ("compile" in stream.getvalue()) == shown
    assert ("1/3 first" in stream.getvalue()) == shown
    assert "a line" not in stream.getvalue()
    assert capsys.readouterr().out == "a line\n"
