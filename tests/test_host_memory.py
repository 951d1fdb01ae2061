"""Memory is filled the fast way whatever its layout."""

import pytest
import torch

from fastsae.host_memory import fill

LAYOUTS = {
    "row by row": lambda rows, columns: torch.randn(rows, columns),
    "column by column": lambda rows, columns: torch.randn(columns, rows).T,
    "part of a larger one": lambda rows, columns: torch.randn(2 * rows, columns + 3)[::2, 1:-2],
    "a row repeated": lambda rows, columns: torch.randn(columns).expand(rows, columns),
}


@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("to", ["row by row", "column by column", "part of a larger one"])
@pytest.mark.parametrize("shape", [(130, 200), (64, 1), (1, 65), (1300, 1100)], ids=str)
def test_any_layout_is_filled_with_any_other(shape, of, to):
    values, new = LAYOUTS[of](*shape), LAYOUTS[to](*shape)
    strides = new.stride()
    assert fill(new, values) is new and new.stride() == strides and new.equal(values)
    assert fill(torch.empty(shape, dtype=torch.bfloat16), values).equal(values.bfloat16())


@pytest.mark.parametrize("t", [torch.tensor(2.5), torch.randn(9), torch.randn(3, 4, 5).transpose(0, 2), torch.ones(0, 3)])
def test_what_is_no_matrix_is_filled_too(t):
    assert fill(torch.empty(t.shape), t).equal(t)
