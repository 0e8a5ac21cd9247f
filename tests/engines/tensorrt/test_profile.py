from __future__ import annotations

import pytest

from hivtp.engines.tensorrt.profile import TileProfile, check_profiles, find_profile, max_tiles
from hivtp_ops.errors import EngineError


def profiles(*texts: str) -> list[TileProfile]:
    return [TileProfile.parse(text) for text in texts]


def test_a_profile_is_read_and_written():
    assert TileProfile.parse("1:2:5") == TileProfile(1, 2, 5)
    assert TileProfile.parse("5") == TileProfile(5, 5, 5)
    assert str(TileProfile(1, 2, 5)) == "1:2:5"


@pytest.mark.parametrize(
    "text", ["", "1:2", "1:2:3:4", "a", "1:b:3", "1.5", "-1", "1: 2:3", "²", "1:2:", "1:1:1000000", "9" * 5000]
)
def test_what_is_not_a_profile_is_refused(text):
    with pytest.raises(EngineError, match="is not a profile of tiles; write fewest:usual:most"):
        TileProfile.parse(text)


@pytest.mark.parametrize("text", ["0", "0:1:2", "2:1:3", "1:3:2", "3:2:1"])
def test_a_profile_whose_numbers_fall_or_begin_at_nothing_is_refused(text):
    with pytest.raises(EngineError, match="rising from 1 or more"):
        TileProfile.parse(text)


@pytest.mark.parametrize(("texts", "missing"), [(["2:3:4"], 1), (["1:1:2", "4:4:8"], 3), (["1", "5"], 2)])
def test_profiles_with_a_gap_are_refused_by_the_number_that_is_missing(texts, missing):
    with pytest.raises(EngineError, match=f"leave out {missing} tiles; add {missing}"):
        check_profiles(profiles(*texts))


def test_profiles_without_a_gap_pass_in_any_order():
    check_profiles(profiles("3:4:8", "1:1:2"))
    check_profiles(profiles("1:1:8", "5"))
    check_profiles(profiles("1:1:999999"))
    with pytest.raises(EngineError, match="needs at least one profile"):
        check_profiles([])


def test_the_narrowest_profile_serves_a_run():
    several = profiles("1:1:8", "5", "2:4:6", "4:4:8")
    found = [find_profile(several, number) for number in range(10)]
    assert found == [None, 0, 2, 2, 2, 1, 2, 3, 3, None]
    assert max_tiles(several) == 8


def test_of_equally_narrow_profiles_the_one_tuned_nearest_serves():
    assert [find_profile(profiles("1:1:4", "1:4:4"), number) for number in (1, 2, 3, 4)] == [0, 0, 1, 1]
