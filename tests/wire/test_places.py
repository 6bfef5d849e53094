"""Places on the wire, and what is wrong with places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiosis.errors import ProtocolError
from symbiosis.wire.places import INLINE, Places, Room, pack_places, unpack_places
from symbiosis.wire.tensors import TensorSpec

U64 = st.integers(0, 2**64 - 1)
PLACES = st.builds(
    Places,
    st.lists(U64, max_size=5).map(tuple),
    st.lists(st.builds(Room, U64, U64), max_size=5).map(tuple),
)
X = TensorSpec(torch.float32, (4, 8))  # 128 bytes
SIZE = 1024


def test_the_bytes_are_those_of_the_protocol() -> None:
    packed = pack_places(Places((64, INLINE), (Room(128, 256),)))
    assert packed == bytes.fromhex(
        "02 01 4000000000000000 ffffffffffffffff 8000000000000000 0001000000000000"
    )


@given(PLACES, st.binary(max_size=9))
def test_there_and_back(places: Places, behind: bytes) -> None:
    packed = pack_places(places)
    assert unpack_places(packed + behind) == (places, len(packed))


@given(PLACES)
def test_cut_short(places: Places) -> None:
    packed = pack_places(places)
    for length in range(len(packed)):
        with pytest.raises(ProtocolError, match="cut short"):
            unpack_places(packed[:length])


@pytest.mark.parametrize(
    "places",
    [
        Places((0,), (Room(128, 128),)),
        Places((896,), (Room(0, 896),)),
        Places((INLINE,), (Room(0, 1024),)),
        Places((0,), ()),
        Places((0,), (Room(0, 0), Room(128, 1))),
    ],
)
def test_good_places(places: Places) -> None:
    places.check((X,), SIZE)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (Places((), ()), "0 places for 1"),
        (Places((0, 256), ()), "2 places for 1"),
        (Places((960,), ()), "outside the arena"),
        (Places((2**64 - 64,), ()), "outside the arena"),
        (Places((32,), ()), "not aligned"),
        (Places((INLINE,), (Room(0, 1025),)), "outside the arena"),
        (Places((INLINE,), (Room(2**64 - 64, 2**63),)), "outside the arena"),
        (Places((INLINE,), (Room(1, 1),)), "not aligned"),
        (Places((0,), (Room(64, 64),)), "overlap"),
        (Places((64,), (Room(0, 65),)), "overlap"),
        (Places((INLINE,), (Room(0, 64), Room(0, 1))), "overlap"),
    ],
)
def test_bad_places(places: Places, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        places.check((X,), SIZE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_do_not_lie_where_their_client_can_change_them(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="integers travel in the payload"):
        Places((0,), ()).check((TensorSpec(dtype, (4,)),), SIZE)
