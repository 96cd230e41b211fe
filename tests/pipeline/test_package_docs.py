"""Documentation of installed packages."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.formats.errors import UserError
from pipeline.data.package_docs import package_documents, package_licence


def test_docstrings_of_a_package_are_documents() -> None:
    documents = {document.source: document for document in package_documents(["numpy"])}
    found = documents["doc:numpy.lib._function_base_impl.trim_zeros"]
    assert found.question == "What is numpy.lib._function_base_impl.trim_zeros?"
    assert (np.trim_zeros.__doc__ or "").strip().split("\n")[0] in found.text
    assert not any(".tests." in source for source in documents)


def test_licences_come_from_the_package_itself() -> None:
    assert package_licence("numpy").startswith("BSD-3-Clause")
    assert package_licence("rich") == "MIT License"


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no-such-package"):
        list(package_documents(["no-such-package"]))
    with pytest.raises(UserError, match="no-such-package"):
        package_licence("no-such-package")
