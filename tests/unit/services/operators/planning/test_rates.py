from __future__ import annotations

from dataclasses import replace

import pytest

from services.operators.planning import Rates, measured_rates
from shelora.errors import InvalidConfiguration
from shelora.plan import HeRate
from shelora.rounds.phases import RoundPhase
from support.operators import PARAMETERS, make_member, make_round

FIGURES = {
    "seconds_he_encrypt": 0.5,
    "seconds_he_decrypt": 0.25,
    "seconds_cipher_upload": 2.0,
    "seconds_download": 4.0,
    "cipher_bytes_down": 131_072.0,
    "average_bytes_down": 68_928.0,
}


def test_cores_encrypt_at_once() -> None:
    rates = Rates(encrypt_values_per_s=100, decrypt_values_per_s=200, upload_bytes_per_s=7, cores=4)
    assert rates.he == HeRate(400, 7)
    assert rates.encrypt_s(800) == 2
    assert rates.decrypt_s(800) == 1


def test_a_decomposition_does_not_care_which_side_is_the_longer() -> None:
    assert Rates().svd_s(300, 20) == Rates().svd_s(20, 300) > 0
    assert Rates().svd_s(0, 20) == 0


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_are_positive_numbers(value) -> None:
    with pytest.raises(InvalidConfiguration, match="memory_values_per_s"):
        Rates(memory_values_per_s=value)


def test_agents_own_figures_become_their_rates() -> None:
    """One block of 4,096 values up in half a second, two down in a quarter of one."""
    found = make_round(1, replace(make_member("agent-1", 4, 32), metrics=FIGURES), make_member("agent-2", 4, 32))
    rates = measured_rates([found], PARAMETERS, Rates(cores=2))
    assert rates.keys() == {"agent-1"}
    own = rates["agent-1"]
    assert own.measured
    assert own.encrypt_values_per_s == 8192
    assert own.decrypt_values_per_s == 32_768
    assert own.upload_bytes_per_s == 32_768
    assert own.download_bytes_per_s == 50_000
    assert own.cores == 1, "what an agent reports is of all its cores"


def test_the_newest_figures_count_and_the_others_stay() -> None:
    first = make_round(1, replace(make_member("agent-1", 4, 32), metrics=FIGURES))
    second = make_round(2, make_member("agent-1", 4, 32, seconds_he_encrypt=0.25))
    unfinished = make_round(3, make_member("agent-1", 4, 32, seconds_he_encrypt=9.0), phase=RoundPhase.CIPHER)
    own = measured_rates([first, second, unfinished], PARAMETERS, Rates())["agent-1"]
    assert own.encrypt_values_per_s == 16_384
    assert own.upload_bytes_per_s == 32_768


def test_what_was_not_measured_keeps_all_cores() -> None:
    found = make_round(1, make_member("agent-1", 4, 32, seconds_he_encrypt=0.5))
    own = measured_rates([found], PARAMETERS, Rates(decrypt_values_per_s=100, cores=3))["agent-1"]
    assert own.decrypt_s(600) == 2


@pytest.mark.parametrize("seconds", [0.0, float("nan"), float("inf")])
def test_figures_that_mean_nothing_are_left_out(seconds) -> None:
    found = make_round(1, make_member("agent-1", 4, 32, seconds_he_encrypt=seconds))
    assert measured_rates([found], PARAMETERS, Rates()) == {}
