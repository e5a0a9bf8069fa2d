"""The trials of the corruption benchmark: the same on each machine, spread over what they are to cover, and aimed at
something that the struck rank has."""

from __future__ import annotations

from collections import Counter

import pytest

from corruption.trial import EARLY, LAYOUTS, RATES, SITES, Trial, delays, rounds
from lockstep_trainer.parallel.stages import modelled_costs, split_layers

ALL = tuple(LAYOUTS)


def trials(each: int = 40, beyond: int = 2, seed: int = 1) -> list[Trial]:
    return [trial for world in rounds(each, beyond, seed, ALL) for trial in world]


def test_a_seed_decides_all_of_them() -> None:
    assert trials() == trials()
    assert trials() != trials(seed=2)


def test_what_a_longer_campaign_adds_leaves_the_rest_as_it_was() -> None:
    more = {trial.name: trial for trial in trials(each=60, beyond=3)}
    assert all(more[trial.name] == trial for trial in trials())


def test_each_has_a_name_of_its_own() -> None:
    names = [trial.name for trial in trials()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", ALL)
def test_every_site_comes_with_every_rate(layout: str) -> None:
    mine = [trial for trial in trials() if trial.layout == layout and trial.kind == "sampled"]
    assert Counter((trial.fault.site, trial.fault.rate) for trial in mine) == {
        (site, rate): 2 for site in SITES for rate in RATES
    }


@pytest.mark.parametrize("layout", ALL)
def test_a_fault_strikes_a_layer_of_its_ranks_stage(layout: str) -> None:
    setting = LAYOUTS[layout]
    layers = split_layers(modelled_costs(setting.config, setting.length), setting.layout.stages)
    for trial in trials():
        if trial.layout == layout:
            stage = setting.layout.coordinates(trial.fault.rank).pipeline
            assert trial.fault.layer in layers[stage], trial


def test_a_fault_that_comes_and_goes_strikes_early() -> None:
    for trial in trials():
        if trial.kind == "update":  # of which each parameter is a chance
            continue
        stream = trial.fault.stream()
        assert any(stream.random() < trial.fault.rate for _ in range(EARLY)), trial


def test_worlds_are_of_one_layout() -> None:
    for world in [*rounds(40, 2, 1, ALL), *delays(2, 1)]:
        assert len({trial.layout for trial in world}) == 1
