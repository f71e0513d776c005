import json

import pytest

from samestep.errors import SettingsError
from samestep.launching import environment
from samestep.settings.options import Options, words_of


@pytest.mark.parametrize(
    ("workers", "replicas", "available", "expected"),
    [
        (None, 8, 2, 2),  # one per core
        (None, 8, 64, 8),  # never more than replicas
        (None, 1, 4, 1),
        (None, "workers", 4, 4),
        (None, None, 4, 4),  # the script has not said yet
        (3, 8, 2, 3),  # what was asked for wins over cores
        (8, 8, 2, 8),
        (5, "workers", 2, 5),
        (1, None, 4, 1),
    ],
)
def test_number_of_workers(workers, replicas, available, expected):
    assert Options(workers=workers, replicas=replicas).num_workers(available) == expected


def test_more_workers_than_replicas_says_what_to_do():
    with pytest.raises(SettingsError) as caught:
        Options(workers=16, replicas=8).num_workers(2)
    assert str(caught.value) == (
        "You set workers=16 but replicas=8, so 8 workers would idle. Use --workers 8, or replicas=16 (a new recipe: "
        "results change)."
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": -2}, "workers=-2"),
        ({"hang_after": -1.0}, "hang_after=-1.0"),
        ({"hang_after": float("inf")}, "hang_after=inf"),
        ({"hang_after": True}, "hang_after=True"),
        ({"workers": 1.5}, r"workers=1\.5"),
        ({"workers": True}, "workers=True"),
        ({"replicas": 0}, "replicas=0"),
        ({"replicas": "many"}, "replicas='many'"),
        ({"threads": 0}, "threads=0"),
        ({"seed": 1.5}, r"seed=1\.5"),
        ({"every": 0}, "every=0"),
        ({"every": "30"}, "every='30'"),
        ({"async_checkpoints": True, "protect": False}, "async_checkpoints and protect=False"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"accept": ("code", "model")}, "accept='model'"),
        ({"device": "cuda", "workers": 2}, "torchrun"),
    ],
)
def test_values_out_of_range_are_named(settings, words):
    with pytest.raises(SettingsError, match=words):
        Options(**settings).check()


def test_the_command_line_wins_over_the_script():
    script = Options(replicas=8, seed=0, threads=1, workers=4)
    merged = Options(workers=2, seed=7).over(script)
    assert merged == Options(replicas=8, seed=7, threads=1, workers=2)


def test_zero_is_a_setting():
    assert Options(seed=0).over(Options(seed=5)).seed == 0


def test_options_cross_as_plain_facts():
    options = Options(replicas="workers", every=3, checkpoint="runs/x", accept=("code",))
    assert Options.from_dict(options.to_dict()) == options


def test_a_traced_run_touches_no_checkpoint():
    keeping = Options(trace=5, checkpoint="runs/x", every=2, resume="runs/x").keeping()
    assert (keeping.trace, keeping.checkpoint, keeping.every, keeping.resume) == (5, None, None, None)


def test_async_checkpoints_need_a_folder():
    Options(async_checkpoints=True).check()  # the script may name it
    with pytest.raises(SettingsError, match="You set async_checkpoints but no checkpoint folder"):
        Options(async_checkpoints=True).keeping()


def test_async_checkpoints_and_times_come_through():
    keeping = Options(async_checkpoints=True, every="30s", checkpoint="runs/x").keeping()
    assert keeping.async_checkpoints and keeping.every_seconds == 30 and not keeping.is_due(30)


def test_accepted_kinds_are_words():
    assert words_of("code, data") == words_of(["code", "data"]) == ("code", "data")
    crossed = Options.from_dict(json.loads(json.dumps(Options(accept=("code", "data")).to_dict())))
    assert crossed.keeping().accept == ("code", "data")
    assert Options(accept=("data",)).over(Options(accept=("code",))).keeping().accept == ("data",)


def test_one_thread_per_library_before_torch_is_imported():
    variables = {"OMP_NUM_THREADS": "8"}
    environment.prepare(variables)
    assert variables == {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO",
    }
    chosen = {"MKL_CBWR": "COMPATIBLE"}
    environment.prepare(chosen)
    assert chosen["MKL_CBWR"] == "COMPATIBLE"


def test_a_launcher_is_recognised_by_all_its_variables(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert not environment.has_launcher()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert not environment.has_launcher()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert environment.has_launcher()
    worker = environment.launched_worker()
    assert (worker.rank, worker.size, worker.local_rank) == (1, 3, 0)


def test_a_launchers_nonsense_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match="RANK=3 and WORLD_SIZE=3"):
        environment.launched_worker()
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(SettingsError, match="RANK='three'"):
        environment.launched_worker()
