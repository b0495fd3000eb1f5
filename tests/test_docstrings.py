"""What numpydoc finds in the docstrings of public names."""

from __future__ import annotations

import enum
import inspect
from types import FunctionType

import pytest

import implicitdiff

# Codes of numpydoc: no docstring, no or misplaced summary, unknown or misordered sections, parameters that are missing,
# unknown or without a description, no Returns.
CHECKED = {"GL06", "GL07", "GL08", "SS01", "SS02", "SS04", "PR01", "PR02", "PR06", "PR07", "RT01", "YD01"}
MADE_BY_US = {"Linearization", "Regularity"}  # classes that a user receives and never constructs


def complaints(name: str) -> dict[str, str]:
    """What numpydoc finds wrong with the docstring of a public name, of the codes checked."""
    validator = pytest.importorskip("numpydoc.validate")
    return {code: message for code, message in validator.validate(f"implicitdiff.{name}")["errors"] if code in CHECKED}


def undocumented(cls: type) -> set[str]:
    """Parameters of a class that neither it nor a base of it documents, as a parameter or as an attribute."""
    validator = pytest.importorskip("numpydoc.validate")
    known: set[str] = set()
    for base in cls.__mro__[:-1]:
        if base.__module__.startswith("implicitdiff"):
            doc = validator.Validator(validator.get_doc_object(base)).doc
            known |= {n for section in ("Parameters", "Attributes") for p in doc[section] for n in p.name.split(", ")}
    return set(inspect.signature(cls).parameters) - known


@pytest.mark.parametrize("name", implicitdiff.__all__)
def test_docstrings(name: str) -> None:
    """Every public function and class documents its parameters and what it returns, in numpydoc's form."""
    found, thing = complaints(name), getattr(implicitdiff, name)
    if inspect.isclass(thing):
        found.pop("PR01", None)  # numpydoc knows neither inherited fields nor Attributes
        if not issubclass(thing, (BaseException, enum.Enum)) and name not in MADE_BY_US and undocumented(thing):
            found["PR01"] = f"not documented: {sorted(undocumented(thing))}"
    assert not found


@pytest.mark.parametrize("name", [n for n in implicitdiff.__all__ if inspect.isclass(getattr(implicitdiff, n))])
def test_public_methods_have_docstrings(name: str) -> None:
    """Every public method and property of a public class has a docstring, if only that of the method it overrides."""
    cls = getattr(implicitdiff, name)
    ours = {
        attribute: value
        for attribute, value in vars(cls).items()
        if not attribute.startswith("_") and isinstance(value, (FunctionType, property, classmethod, staticmethod))
    }
    assert [attribute for attribute in ours if not inspect.getdoc(getattr(cls, attribute))] == []
