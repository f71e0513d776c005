"""Sites that agree: as replicas under `Local` where all are there, and going on where one is late or lost."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from meeting import (
    ROWS,
    Meeting,
    meeting,
    one_site,
    plain,
    play_alone,
    rows,
    train,
    uneven,
    uneven_by_hand,
    visit,
)
from playing import play

import samestep
from samestep.core.calls import Calls
from samestep.core.worker import Wish
from samestep.errors import MismatchError
from samestep.sites import outer_state

SETTINGS = {"every": 4, "patience": 30.0}


def told_of_rounds(place: Meeting) -> list[str]:
    return [text.partition(": ")[2] for text in place.told if text.startswith("Round")]


@pytest.mark.parametrize(
    ("outer", "codec"), [(["Average"], ["Exact"]), (["Nesterov", 0.5, 0.5], ["Exact"]), (["Average"], ["TopK", 0.3])]
)
def test_sites_are_as_replicas_that_step_by_themselves(fleet, outer, codec):
    way = samestep.Local(
        every=4, outer=getattr(samestep, outer[0])(*outer[1:]), codec=getattr(samestep.codecs, codec[0])(*codec[1:])
    )
    weights, _ = play(train(way, rows(), ROWS), 2, 1).result
    with meeting() as place:
        sites = fleet.play(visit, "bare", 2, settings={**SETTINGS, "at": place.at, "outer": outer, "codec": codec})
    assert told_of_rounds(place) == ["site 0, site 1."] * 3
    for site in sites:
        assert site["weights"] == plain(weights)
        assert site["once"]
        assert site["standings"][-1]["counted"] == 3


def test_uneven_sites_with_buffers_and_two_optimizers_are_as_by_hand(fleet):
    with meeting() as place:
        sites = fleet.play(uneven, "bare", 2, at=place.at)
    assert told_of_rounds(place) == ["site 0, site 1."] * 3
    assert sites[0] == sites[1]
    for mine, theirs in zip(sites[0], uneven_by_hand(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_a_site_without_others_is_as_one_that_never_met_any():
    """Whatever the place does meanwhile: the mean of one site's weights is these weights."""
    plain_weights, _ = play(train(samestep.Synchronous(), rows(), ROWS), 1, 1).result
    places = [Meeting()]

    def after(run, step) -> None:
        if step.number == 4:
            places[0].close()
        if step.number == 8:
            # It knows nothing any more; the site, which has given what was not answered, brings its weights.
            places.append(Meeting(port=places[0].port))

    way = samestep.Sites(places[0].at, "alone", every=2, quorum=1, reach=0.2)
    try:
        weights, _ = play(train(way, rows(), ROWS, after=after), 1, 1).result
    finally:
        places[-1].close()
    assert len(told_of_rounds(places[0])) == 2 and len(told_of_rounds(places[1])) >= 2
    for mine, theirs in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_holds_steps_that_count_already_counts_in_none():
    """As of a run that had ended at update 5, and goes on from its checkpoint before: the place knows of it alone."""
    standings = []

    def after(run, step) -> None:
        if step.number == 5:
            table = place.place._table
            table.last["alone"] = replace(table.last["alone"], sequence=5)
        standings.append(run._session.agreed.facts()["site"])

    with meeting() as place:
        way = samestep.Sites(place.at, "alone", every=4, quorum=1)
        play(train(way, rows(), ROWS, steps=8, after=after), 1, 1)
    assert [standings[-1][name] for name in ("counted", "refused", "given")] == [1, 1, 8]
    assert told_of_rounds(place) == ["alone."]


def test_the_state_is_kept_in_memory_after_each_answer(monkeypatch):
    asked = []
    ask = Calls.ask
    monkeypatch.setattr(Calls, "ask", lambda self, wish: asked.append(wish) or ask(self, wish))
    with meeting() as place:
        play(train(one_site(place.at), rows(), ROWS, steps=8), 2, 1)
    # Joining, and three rounds.
    assert asked.count(Wish.SNAPSHOT) == 4


def test_what_comes_back_compressed_is_the_same_on_all_sites(fleet, monkeypatch):
    """And where a site comes to other weights by it, it asks for the weights themselves."""
    settings = {**SETTINGS, "codec": ["Int8"], "back": ["TopK", 0.2], "outer": ["Nesterov", 0.5, 0.5]}
    weights, asked = [], []
    for spoils in (False, True):
        with meeting() as place:
            newest = place.place.newest
            if spoils:
                monkeypatch.setattr(outer_state, "tensors_digest", lambda named: "other")
            monkeypatch.setattr(place.place, "newest", lambda newest=newest: asked.append(1) or newest())
            sites = fleet.play(visit, "bare", 2, settings={**settings, "at": place.at})
        assert sites[0]["weights"] == sites[1]["weights"]
        weights.append(sites[0]["weights"])
        assert len(asked) == (6 if spoils else 0)
    assert weights[0] == weights[1]


def test_who_is_late_counts_in_a_later_round(fleet, tmp_path):
    file = tmp_path / "go on"
    # Site 1 comes to its first contribution when two rounds are made without it.
    tricks = {"1": {"waits": [[2, str(file)]], "steps": 8}}
    settings = {**SETTINGS, "quorum": 1, "patience": 0.2, "reach": 0.2}
    with meeting(when={"Round 2": file.touch}) as place:
        first, second = fleet.play(visit, "bare", 2, settings={**settings, "at": place.at}, tricks=tricks)
    assert told_of_rounds(place)[:2] == ["site 0.", "site 0."]
    late = [text for text in told_of_rounds(place) if "of an earlier one: site 1" in text]
    assert late
    assert [s["standings"][-1]["counted"] for s in (first, second)] == [3, 2]
    assert second["standings"][-1]["late"] >= 1 and first["standings"][-1]["late"] == 0
    assert sum("site 1" in text.partition(";")[0] for text in told_of_rounds(place)) == 2


def test_who_is_too_late_starts_again_from_what_the_others_have(fleet, tmp_path):
    file = tmp_path / "go on"
    tricks = {"1": {"waits": [[2, str(file)]], "steps": 4}}
    settings = {**SETTINGS, "quorum": 1, "patience": 0.2, "reach": 0.2, "bound": 1}
    with meeting(when={"Round 3": file.touch}) as place:
        first, second = fleet.play(visit, "bare", 2, settings={**settings, "at": place.at}, tricks=tricks)
    assert told_of_rounds(place) == ["site 0."] * 3
    assert any("Site 'site 1' is 3 rounds behind" in text for text in place.told)
    last = second["standings"][-1]
    assert {name: last[name] for name in ("round", "given", "counted", "refused")} == {
        "round": 3,
        "given": 4,
        "counted": 0,
        "refused": 1,
    }
    assert second["weights"] == first["weights"]


def test_who_is_lost_is_waited_for_once(fleet):
    settings = {**SETTINGS, "quorum": 1, "patience": 0.2, "reach": 0.2}
    with meeting() as place:
        told = fleet.outcomes(visit, "bare", 2, settings={**settings, "at": place.at}, tricks={"1": {"dies": 5}})
    assert told[1]["exit"] == 9
    assert told[0]["returned"]["standings"][-1]["counted"] == 3
    assert "site 1" not in told_of_rounds(place)[-1]


def started_again(fleet, settings, folder: str | None) -> tuple[list, list[Meeting]]:
    """Let two sites meet at a place that is lost after its first round, and started again at once."""
    places: list[Meeting] = []

    def again() -> None:
        places[0].close()
        places.append(Meeting(folder, port=places[0].port))

    places.append(Meeting(folder, when={"Round 1": again}))
    try:
        sites = fleet.play(visit, "bare", 2, settings={**settings, "at": places[0].at})
    finally:
        places[0].await_helpers()
        places[-1].close()
    assert len(places) == 2
    return sites, places


def test_a_place_that_is_started_again_changes_nothing(fleet, tmp_path):
    settings = {**SETTINGS, "outer": ["Nesterov", 0.5, 0.5]}
    with meeting() as place:
        undisturbed = fleet.play(visit, "bare", 2, settings={**settings, "at": place.at})
    disturbed, places = started_again(fleet, settings, str(tmp_path / "place"))
    for one, other in zip(disturbed, undisturbed, strict=True):
        assert one["weights"] == other["weights"] and one["losses"] == other["losses"]
    assert places[1].told[0].startswith("Goes on after round 1")
    assert told_of_rounds(places[1]) == ["site 0, site 1."] * 2


def test_where_a_place_forgets_everything_sites_go_on_from_what_they_have(fleet):
    sites, places = started_again(fleet, SETTINGS, None)
    assert "brought" in places[1].told[0]
    assert all(site["once"] for site in sites)


def test_sites_go_on_alone_while_there_is_no_place(fleet, tmp_path):
    gone, back = tmp_path / "gone", tmp_path / "back"
    places: list[Meeting] = []

    def leave() -> None:
        places[0].close()
        gone.touch()
        while not all((tmp_path / f"alone {n}").exists() for n in (0, 1)):
            time.sleep(0.01)
        places.append(Meeting(str(tmp_path / "place"), port=places[0].port))
        back.touch()

    places.append(Meeting(str(tmp_path / "place"), when={"Round 1": leave}))
    # Alone for one contribution at least; at the end of the steps with the others again.
    waits = [[5, str(gone)], [10, str(back)]]
    tricks = {str(n): {"waits": waits, "makes": [9, str(tmp_path / f"alone {n}")], "steps": 10} for n in (0, 1)}
    try:
        settings = {**SETTINGS, "patience": 0.3, "reach": 0.3, "at": places[0].at}
        sites = fleet.play(visit, "bare", 2, settings=settings, tricks=tricks)
    finally:
        places[0].await_helpers()
        places[-1].close()
    assert sites[0]["weights"] == sites[1]["weights"]
    assert told_of_rounds(places[1]) == ["site 0, site 1."] * 2
    for site in sites:
        assert site["standings"][8]["missed"] >= 1, site["standings"]
        assert site["once"]


@pytest.mark.parametrize("dies", [4, 6])
def test_a_resumed_site_is_as_one_that_never_stopped(fleet, tmp_path, dies):
    """Also where it has given what its newest checkpoint does not know of: at its fourth step."""
    settings = {**SETTINGS, "quorum": 1, "outer": ["Nesterov", 0.5, 0.5], "codec": ["TopK", 0.3]}
    with meeting() as place:
        (whole,) = fleet.play(visit, "bare", 1, settings={**settings, "at": place.at})
    folder = str(tmp_path / "run")
    with meeting() as place:
        settings["at"] = place.at
        tricks = {"checkpoint": folder, "dies": dies}
        (died,) = fleet.outcomes(visit, "bare", 1, settings=settings, tricks={"0": tricks})
        (resumed,) = fleet.play(visit, "bare", 1, settings=settings, tricks={"0": {"resume": folder}})
    assert died["exit"] == 9
    assert resumed["weights"] == whole["weights"] and resumed["losses"] == whole["losses"]
    assert len(told_of_rounds(place)) == 3


def test_a_site_of_any_number_of_workers_is_the_same(fleet):
    told = []
    for kind, size in (("bare", 1), ("arena", 3), ("gloo", 2)):
        with meeting() as place:
            if kind == "bare":
                main = train(one_site(place.at), rows(), ROWS, steps=8, normed=True)
                told.append(play(main, 4, 1).as_words())
            else:
                told += fleet.play(play_alone, kind, size, at=place.at)
        assert told_of_rounds(place) == ["alone."] * 3
    assert set(told) == {told[0]}


def test_sites_with_other_dtypes_are_refused():
    """Their contributions look alike: what crosses is measured in float32."""

    def of(name: str, dtype: torch.dtype):
        def main(run: samestep.Run) -> None:
            model = torch.nn.Linear(3, 1).to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            run.replicate(model, optimizer, agree=samestep.Sites(place.at, name, every=2, quorum=1))
            for step in run.steps(rows(), batch_size=ROWS, steps=4):
                for a, b in step:
                    step.backward((model(a.to(dtype)) - b.to(dtype)).float().square().mean())
                step.update()

        return main

    with meeting() as place:
        play(of("a", torch.float32), 1, 1)
        with pytest.raises(MismatchError, match="bfloat16"):
            play(of("b", torch.bfloat16), 1, 1)
