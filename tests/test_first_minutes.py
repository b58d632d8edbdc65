"""README's snippet and its output are found, and only outputs that say the same pass for equal."""

import pytest

from tests.first_minutes import differences, output, snippet

README = """# x
```sh
make
```
```python
a = 1
{last}
```
It prints:
```text
{shown}
```
```python
other
```
"""


@pytest.mark.parametrize("last", ["print(f'{a} cat')", "f'{a} cat'"])
def test_the_first_block_runs_and_shows_its_last_line(last, capsys):
    exec(snippet(README.format(last=last, shown="")))
    assert capsys.readouterr().out.strip("'\n") == "1 cat"


def test_the_output_is_the_text_below_the_first_block():
    assert output(README.format(last="a", shown="1\n2")) == "1\n2\n"
    apart = README.replace("```text", "```sh\n```\n```text")
    for wrong in (apart, "```python\nx\n```\n"):
        with pytest.raises(SystemExit, match="README shows no output"):
            output(wrong)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("KL 0.293 [0.245, 0.35]\n", "KL  0.294 [0.244, 0.35]"),
        ("1,999 rows", "2,000 rows"),
        ("p 3.1e-05, .27", "p 3.2e-05, .28"),
        ("layer 7", "layer 7"),
    ],
)
def test_rounding_and_spaces_are_ignored(shown, printed):
    assert differences(shown, printed) == []


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("KL 0.293", "KL 0.313"),
        ("KL 0.293", "JS 0.293"),
        ("share 0.05", "share -0.05"),
        ("p 3.1e-05", "p 3.1e-04"),
        ("1 2", "1 2 3"),
        ("20 of 40 rows", "22 of 40 rows"),
    ],
)
def test_other_words_or_numbers_are_differences(shown, printed):
    assert differences(shown, printed)
