"""Chains as parameters of an exchange, there and back, and what is malformed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError
from symbiosis.wire.chain import MAX_STEPS, Chain, Instruction, Step, pack_chain, unpack_chain

numbers = st.integers(0, 2**31)
instructions = st.builds(
    Instruction, st.sampled_from(Step), numbers, numbers, numbers, st.floats(allow_nan=False)
)
chains = st.builds(
    Chain,
    st.lists(instructions, min_size=1, max_size=40).map(tuple),
    st.lists(numbers, min_size=1, max_size=20).map(tuple),
)


@given(chains)
def test_round_trip(chain: Chain) -> None:
    assert unpack_chain(pack_chain(chain)) == chain


@pytest.mark.parametrize(
    "params",
    [
        (),
        (0,),
        (-1, 1),
        (1, Step.RELU, 0, 0, 0, 0),  # returns nothing
        (1, Step.RELU, 0),
        (2, Step.RELU, 0, 0, 0, 0, 1),  # promises two steps
        (1, 99, 0, 0, 0, 0, 1),
        (1, Step.RELU, -1, 0, 0, 0, 1),
        (MAX_STEPS + 1, *(Step.RELU, 0, 0, 0, 0) * (MAX_STEPS + 1), 1),
    ],
)
def test_malformed_chains_are_told(params: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="chain"):
        unpack_chain(params)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30).map(tuple))
def test_whatever_arrives_is_a_chain_or_told(params: tuple[int, ...]) -> None:
    with contextlib.suppress(ProtocolError):
        assert isinstance(unpack_chain(params), Chain)
