"""What GitHub runs, as far as it can be checked here: the files parse, and every step calls a target of make that exists."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_existing_make_targets(path):
    workflow = read(path)
    assert workflow[True] and workflow["permissions"], "`on` is read as true"
    made = []
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and job["runs-on"]
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert uses[0].startswith("actions/checkout@") and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", u) for u in uses)
        made += [word for step in job["steps"] for word in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))]
    assert made and set(made) <= TARGETS


def test_workflows_test_with_and_without_the_lock():
    steps = [
        step.get("run")
        for workflow in map(read, WORKFLOWS)
        for job in workflow["jobs"].values()
        for step in job["steps"]
    ]
    assert {"make test", "make test-latest", "make docs"} <= set(steps)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_complete(path):
    form = read(path)
    assert form["name"] and form["description"]
    fields = [field["id"] for field in form["body"]]
    assert len(set(fields)) == len(fields) and all(field["attributes"]["label"] for field in form["body"])
    if path.stem == "bug":
        assert fields == ["version", "model", "command", "error"]
        assert all(field["validations"]["required"] for field in form["body"])
