import io
import json

import pytest

from samestep.errors import SettingsError
from samestep.measure import summary

FACTS = {
    "result": {"accuracy": 0.9861, "loss": 0.05},
    "steps": 276,
    "samples": 17244,
    "seconds_total": 30.0,
    "samples_per_second": 1234.5,
    "seconds": {"data": 1.0, "compute": 20.0, "wait": 4.0, "update": 3.0, "other": 2.0},
    "peak_memory_bytes": 300 * 2**20,
    "state_bytes": 2**20,
    "workers": 2,
    "replicas": 8,
    "threads": 1,
    "seed": 0,
    "device": "cpu",
    "torch": "2.13.0",
    "weights_digest": "cf4adc1cdcc581c8",
    "samples_exactly_once": True,
    "samples_sentence": "1,437 of 1,437 samples exactly once per epoch, 12 epochs",
    "notes": ["Resumed from runs/x."],
}


def shown(facts):
    stream = io.StringIO()
    summary.show(facts, stream)
    return stream.getvalue()


def with_seconds(**seconds):
    return {**FACTS, "seconds": {**dict.fromkeys(FACTS["seconds"], 0.0), **seconds}}


def test_a_summary_shows_everything_a_person_wants():
    text = shown(FACTS)
    for words in (
        "accuracy 98.6%, loss 0.05",
        "30.0 s for 276 steps, 17,244 samples",
        "1,234 samples/s",
        "300.0 MiB",
        "2 workers, 8 replicas, 1 thread each, seed 0, cpu, torch 2.13.0",
        "1,437 of 1,437 samples exactly once per epoch, 12 epochs",
        "cf4adc1cdcc581c8 (the same for any number of workers)",
        "compute 67%, wait 13%, reduce+update 10%, other 7%, data 3%",
        "Resumed from runs/x.",
    ):
        assert words in text


@pytest.mark.parametrize("missing", [*FACTS, None])
def test_missing_facts_are_left_out(missing):
    facts = {name: value for name, value in FACTS.items() if name != missing} if missing else {}
    text = shown(facts)
    assert "None" not in text
    assert "samestep" in text


def test_a_broken_proof_is_not_hidden():
    assert "NOT each sample exactly once" in shown({**FACTS, "samples_exactly_once": False})


def test_plain_speed_makes_no_promise():
    assert "the same for any number" not in shown({**FACTS, "replicas_fixed": False})


def test_a_bar_is_as_long_as_its_room_whatever_the_shares():
    for seconds in ({"data": 1.0, "compute": 1.0, "wait": 1.0}, {"compute": 5.0}, {"other": 1.0, "update": 1e-9}):
        text = shown(with_seconds(**seconds))
        assert max(line.count("█") for line in text.splitlines()) == 48


def test_results_of_any_kind_are_shown():
    assert "0.123457" in shown({"result": 0.1234567})
    assert "[1, 2]" in shown({"result": [1, 2]})
    assert "..." in shown({"result": "x" * 1000})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (with_seconds(data=3.0, compute=7.0), "loaders=2"),
        (with_seconds(wait=3.0, compute=7.0), "Workers waited for each other 30%"),
        (with_seconds(update=5.0, compute=5.0), "larger batch_size"),
        (with_seconds(other=5.0, compute=5.0), "the script's own code"),
        (with_seconds(compute=9.0, wait=1.0), "Nothing stands out"),
        ({**with_seconds(wait=3.0, compute=7.0), "workers": 3}, "do not divide evenly by 3 workers"),
        ({**with_seconds(wait=3.0, compute=7.0), "workers": 1}, "Nothing stands out"),
    ],
)
def test_advice(facts, words):
    assert words in summary.advice(facts)


def test_no_advice_without_knowledge():
    assert summary.advice({}) == ""
    assert summary.advice({**with_seconds(data=1.0), "seconds_total": 0.5}) == ""


def test_the_largest_problem_at_its_border_is_not_named():
    assert "loaders" not in summary.advice(with_seconds(data=2.0, compute=8.0))


def test_facts_are_stored_whole(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")
    summary.store({**FACTS, "nan": float("nan"), "object": object}, str(path))
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert stored["result"] == FACTS["result"]
    assert stored["seconds"] == FACTS["seconds"]
    assert stored["nan"] == "nan"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(SettingsError, match="cannot be written"):
        summary.store(FACTS, str(tmp_path / "missing" / "facts.json"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingsError, match="folder"):
        summary.store(FACTS, str(tmp_path / "folder"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_it_tells_how_many_updates_were_looked_at():
    facts = {**FACTS, "updates": 3000, "updates_verified": 2934}
    assert "no bit flipped before 2,934 of 3,000 updates" in shown(facts)
    assert "memory checks" not in shown({**facts, "updates_verified": 0}) and "memory checks" not in shown(FACTS)


def test_it_tells_how_many_shards_were_audited():
    facts = {**FACTS, "workers": 2, "audited": 1_047}
    assert "1,047 shards were computed by two workers, with the same bits" in shown(facts)
    assert "1 shard was computed twice" in shown({**facts, "workers": 1, "audited": 1})
    assert "audits" not in shown({**facts, "audited": 0}) and "audits" not in shown(FACTS)


def test_it_tells_how_stale_the_weights_were():
    facts = {**FACTS, "staleness": {0: 10, 2: 30}, "stale_bytes": 1 << 20}
    assert "0: 25%, 2: 75% of the shards; 1.0 MiB" in shown(facts)
    assert "that replay this schedule" in shown(facts)
    assert "replay" not in shown({**facts, "staleness": {0: 40}})
    fixed = " ".join(shown({**facts, "fixed_schedule": True, "stale_per_worker": True}).replace("│", " ").split())
    assert "replay" not in fixed and "1.0 MiB per worker" in fixed
