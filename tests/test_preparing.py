"""From files to rows: weights, bad lines, limits, packing, processes, and the command."""

import gzip
import json
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import QUICKSTART, autotune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dataset import PLAIN, build_tokenizer, run

from autotune import builtin
from autotune.dataset import Rows, Rules, Source, prepare, workers
from autotune.dataset.lines import read_blocks
from autotune.dataset.packing import pack, require_separation
from autotune.dataset.sources import BadLineCap
from autotune.errors import DatasetError, UsageError
from autotune.workload import DatasetProfile


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tokenizer(PLAIN).save_pretrained(directory)
    return directory


def row(question: str, answer: str) -> bytes:
    return orjson.dumps({"prompt": question, "response": answer})


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def prepare_all(
    sources: list[Source],
    model_dir: Path,
    output: Path,
    **options: Any,  # noqa: ANN401
) -> DatasetProfile:
    defaults: dict[str, Any] = {
        "max_seq_length": 1000,
        "trust_remote_code": False,
        "vocab_size": 1000,
    }
    return prepare(sources, model_dir=model_dir, output=output, **(defaults | options))


BAD = [
    b"{",
    b'{"prompt": "a", "response": NaN}',
    b'{"prompt": "\\ud83d", "response": "b"}',
    b'{"prompt": "a", "prompt": "b", "response": "c"}',
    b'{"prompt": "a", "response": 5}',
    b"[1]",
    b'{"prompt": "a\xff", "response": "b"}',
]


def test_bad_lines_are_skipped_counted_and_kept_in_quarantine(
    tmp_path: Path, model_dir: Path
) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"), *BAD, row("c", "d"))
    for mode in ("skip", "quarantine"):
        output = tmp_path / mode
        profile = run(path, model_dir, output=output, rules=Rules(on_bad_line=mode))
        assert (profile.rows, profile.rows_used, profile.rows_bad) == (9, 2, 7)
        assert profile.rows_reported == 7
        reported = [orjson.loads(line) for line in (output / "reported.jsonl").open("rb")]
        assert [record["line"] for record in reported] == list(range(2, 9))
        content = path.read_bytes()
        for record, line in zip(reported, BAD, strict=True):
            assert content[record["byte"] :].startswith(line)
            assert record["reason"]
        kept = (output / "quarantine.jsonl").read_bytes().splitlines()
        assert kept == (BAD if mode == "quarantine" else [])


def test_a_row_of_which_the_loss_sees_no_token_is_bad(tmp_path: Path, model_dir: Path) -> None:
    rows = [{"input_ids": [5, 6], "labels": [5, -100]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    path = write(tmp_path / "data.jsonl", *map(orjson.dumps, rows))
    profile = run(path, model_dir, rules=Rules(on_bad_line="skip"))
    assert (profile.rows_used, profile.rows_bad) == (1, 1)


@pytest.mark.parametrize(
    ("cap", "bad", "rows", "allowed"),
    [
        (BadLineCap(), 100, 100, True),
        (BadLineCap(), 101, 101, False),
        (BadLineCap(), 1000, 100_000, True),
        (BadLineCap.parse("0"), 1, 100, False),
        (BadLineCap.parse("3"), 3, 3, True),
        (BadLineCap.parse("2%"), 2, 100, True),
        (BadLineCap.parse("2%"), 3, 100, False),
    ],
)
def test_a_cap_bounds_the_bad_lines(cap: BadLineCap, bad: int, rows: int, *, allowed: bool) -> None:
    assert cap.allows(bad, rows) is allowed


@pytest.mark.parametrize("text", ["many", "-1", "200%", "x%"])
def test_what_is_no_cap_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is"):
        BadLineCap.parse(text)


def test_a_file_with_too_many_bad_lines_is_refused(tmp_path: Path, model_dir: Path) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"), *BAD)
    rules = Rules(on_bad_line="skip", max_bad_lines=BadLineCap.parse("50%"))
    with pytest.raises(DatasetError, match="7 of 8 lines are bad, more than --max-bad-lines"):
        run(path, model_dir, rules=rules)


def test_overlong_rows_are_cut_dropped_or_refused(tmp_path: Path, model_dir: Path) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"), row("a", "b " * 100))
    whole = run(path, model_dir, output=tmp_path / "whole")
    cut = run(path, model_dir, max_seq_length=50, output=tmp_path / "cut")
    dropped = run(
        path, model_dir, max_seq_length=50, output=tmp_path / "drop", rules=Rules(overlong="drop")
    )
    assert (cut.rows_used, cut.rows_truncated, cut.rows_reported) == (2, 1, 0)
    assert (dropped.rows_used, dropped.rows_overlong, dropped.rows_reported) == (1, 1, 1)
    assert whole.tokens == cut.tokens + cut.tokens_lost == dropped.tokens + dropped.tokens_lost
    assert "lose" in cut.warnings[0]
    assert "left out" in dropped.warnings[0]
    with pytest.raises(DatasetError, match=r"line 2 \(byte 30\): .* raise --max-seq-length"):
        run(path, model_dir, max_seq_length=50, rules=Rules(overlong="refuse"))


def test_files_are_taken_as_often_as_their_weights_say(tmp_path: Path, model_dir: Path) -> None:
    one = write(tmp_path / "one.jsonl", *[row("a", str(i)) for i in range(5)])
    two = write(tmp_path / "two.jsonl", *[orjson.dumps({"text": "b b"})] * 4)
    profile = prepare_all([Source(one, 2.0), Source(two, 0.5)], model_dir, tmp_path / "rows")
    assert profile.format == "prompt-response+text"
    assert (profile.rows, profile.rows_used, profile.rows_reported) == (9, 7, 2)
    rows = Rows.open(tmp_path / "rows")
    assert profile.sequences == len(rows) == 12
    assert profile.tokens == sum(len(rows[i][0]) for i in range(12))
    assert profile.trained_tokens == sum(int(rows[i][1].sum()) for i in range(12))


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl@2", "a.jsonl", 2.0),
        ("a@b.jsonl", "a@b.jsonl", 1.0),
        ("a@b.jsonl@.5", "a@b.jsonl", 0.5),
    ],
)
def test_a_weight_is_read_behind_the_path(text: str, path: str, weight: float) -> None:
    assert Source.parse(text) == Source(Path(path), weight)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_weight_that_is_no_number_above_zero_is_refused(weight: str) -> None:
    with pytest.raises(UsageError, match="no number above zero"):
        Source.parse(f"a.jsonl@{weight}")


def test_an_archive_and_an_array_give_the_rows_of_the_lines(
    tmp_path: Path, model_dir: Path
) -> None:
    lines = [row("a", "b"), row("c", "d")]
    plain = run(write(tmp_path / "data.jsonl", *lines), model_dir, output=tmp_path / "1")
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\n".join(lines)))
    array = write(tmp_path / "data.json", b"[", lines[0] + b",", lines[1], b"]")
    for number, path in enumerate((packed, array), start=2):
        profile = run(path, model_dir, output=tmp_path / str(number))
        assert (profile.rows, profile.tokens) == (plain.rows, plain.tokens)


def test_rows_are_taken_from_the_cache_in_another_directory(
    tmp_path: Path, model_dir: Path
) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"))
    first = run(path, model_dir, output=tmp_path / "1", cache=tmp_path / "cache")
    second = run(path, model_dir, output=tmp_path / "2", cache=tmp_path / "cache")
    assert first == second
    ids = [(tmp_path / name / "input_ids.npy").stat().st_ino for name in ("1", "2")]
    assert ids[0] == ids[1]


def test_a_stricter_cap_is_not_passed_by_rows_that_are_there_already(
    tmp_path: Path, model_dir: Path
) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"), b"{")
    run(path, model_dir, cache=tmp_path / "cache", rules=Rules(on_bad_line="skip"))
    strict = Rules(on_bad_line="skip", max_bad_lines=BadLineCap.parse("0"))
    with pytest.raises(DatasetError, match="1 of 2 lines are bad"):
        run(path, model_dir, cache=tmp_path / "cache", rules=strict)


def test_training_on_the_prompt_does_not_warn_of_answers_without_an_end(
    tmp_path: Path, model_dir: Path
) -> None:
    path = write(tmp_path / "data.jsonl", row("a", "b"))
    assert run(path, model_dir, rules=Rules(train_on_prompt=True)).warnings == ()


def test_the_end_of_the_data_is_the_end_of_the_progress(tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(row("a", str(i)) for i in range(999))))
    seen: list[Any] = []
    run(path, model_dir, watch=seen.append)
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert seen[-1].seconds_left == 0


def test_processes_make_the_same_rows_in_the_same_order(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [row(f"question {i}", "answer " * (1 + i % 7)) for i in range(6000)]
    lines[3000:3000] = BAD
    path = write(tmp_path / "data.jsonl", *lines)
    assert len(list(read_blocks(path))) == 1
    monkeypatch.setattr("autotune.dataset.lines.read_blocks.__defaults__", (20_000,))
    rules = Rules(on_bad_line="skip")
    alone = run(path, model_dir, output=tmp_path / "alone", rules=rules)
    monkeypatch.setattr(workers, "PARALLEL_BYTES", 0)
    seen: list[Any] = []
    together = run(path, model_dir, output=tmp_path / "many", rules=rules, watch=seen.append)
    assert alone == together
    for name in ("input_ids.npy", "trained.npy", "offsets.npy", "reported.jsonl"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert seen[-1].rows == 6007
    assert [p.rows for p in seen] == sorted(p.rows for p in seen)


def test_a_missing_template_is_told_from_a_process_as_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autotune.errors import InputMissingError

    build_tokenizer(None).save_pretrained(tmp_path / "model")
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    monkeypatch.setattr(workers, "PARALLEL_BYTES", 0)
    with pytest.raises(InputMissingError, match="has no chat template"):
        run(path, tmp_path / "model")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.lists(
        st.one_of(
            st.sampled_from([row("a", "b"), row("c", "d" * 80), row("", ""), *BAD]),
            st.binary(max_size=40),
        ),
        max_size=8,
    )
)
def test_rows_in_are_rows_used_and_rows_reported_whatever_is_in_the_file(
    tmp_path: Path, model_dir: Path, content: list[bytes]
) -> None:
    path = write(tmp_path / "data.jsonl", *content)
    try:
        lines = sum(1 for block in read_blocks(path) for _ in block)
        profile = run(path, model_dir, max_seq_length=60, rules=Rules(on_bad_line="skip"))
    except DatasetError as error:
        assert "\n" not in str(error)  # noqa: PT017 - only if one is raised
        return
    reported = (tmp_path / "rows" / "reported.jsonl").read_bytes().count(b"\n")
    assert profile.rows == lines == profile.rows_used + profile.rows_reported
    assert profile.rows_reported == reported


# Packing


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packs_hold_every_sequence_once_and_none_is_too_long(lengths: list[int]) -> None:
    order, packs = pack(np.asarray(lengths), 20)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in order[a:b]) for a, b in pairwise(packs)]
    assert max(sums) <= 20
    assert len(sums) <= 2 * -(-sum(lengths) // 20)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["glm", "llama", "qwen3", "gemma3_text"])
def test_packed_rows_give_the_logits_and_losses_of_separate_rows(
    tmp_path: Path, model_dir: Path, kind: str, attention: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autotune.engine.batches import PaddingCollator, RowDataset

    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=400,
        max_position_embeddings=256,
        pad_token_id=0,
        sliding_window=16,
    )
    (tmp_path / "model").mkdir()
    config.save_pretrained(tmp_path / "model")
    require_separation(tmp_path / "model", attention, trust_remote_code=False)
    path = write(tmp_path / "data.jsonl", *[row("a" * i, "b" * (9 - i)) for i in range(1, 8)])
    run(path, model_dir, output=tmp_path / "apart", max_seq_length=140)
    profile = run(
        path, model_dir, output=tmp_path / "packed", max_seq_length=140, rules=Rules(packing=True)
    )
    apart, packed = Rows.open(tmp_path / "apart"), Rows.open(tmp_path / "packed")
    assert profile.packing
    assert len(packed) < len(apart) == 7
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    # As the engine builds it: with a cache transformers takes positions for those of one sequence.
    model.config.use_cache = False
    batch = PaddingCollator(0)([RowDataset(packed)[i] for i in range(len(packed))])
    assert "attention_mask" not in batch
    separate = PaddingCollator(0)([RowDataset(apart)[i] for i in range(7)])
    with torch.no_grad():
        together, alone = model(**batch), model(**separate)
    expected = {tuple(apart[i][0].tolist()): alone.logits[i, : len(apart[i][0])] for i in range(7)}
    seen = 0
    for place in range(len(packed)):
        positions = batch["position_ids"][place]
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
        for start, stop in pairwise(starts):
            ids = tuple(batch["input_ids"][place, start:stop].tolist())
            if ids in expected:
                torch.testing.assert_close(together.logits[place, start:stop], expected[ids])
                seen += 1
    assert seen == 7
    torch.testing.assert_close(together.loss, alone.loss)


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        ({"model_type": "llama"}, "flash_attention_2", "only where a micro-batch is one row"),
        ({"model_type": "mamba"}, "sdpa", "carry a state along the row"),
        ({"model_type": "qwen3_next"}, "sdpa", "linear_attention carry a state"),
        ({"model_type": "nobody_knows"}, "sdpa", "cannot be read"),
        ({"model_type": "bloom"}, "sdpa", "does not build its mask from positions"),
    ],
)
def test_packing_is_refused_where_samples_would_mix(
    tmp_path: Path, config: dict[str, object], attention: str, reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=reason):
        require_separation(tmp_path, attention, trust_remote_code=False)


# The command


def test_data_prints_the_figures_and_an_example(tmp_path: Path) -> None:
    done = autotune("data", QUICKSTART, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "form       messages" in done.stdout
    assert "⟦" in done.stdout
    assert "<|endoftext|>⟧" in done.stdout
    assert "whole within a limit of" in done.stdout
    assert "\x1b" not in done.stdout


def test_data_gives_the_json_document(tmp_path: Path) -> None:
    lines = [
        orjson.dumps(
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": f"Hello {i}"},
                ],
                "id": i + 1,
            }
        )
        for i in range(3)
    ]
    path = write(tmp_path / "data.jsonl", *lines, b"{")
    done = autotune("data", path, "--json", "--show", "2", "--on-bad-line", "skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["format"] == "sharegpt"
    assert (document["rows"], document["rows_used"], document["rows_reported"]) == (4, 3, 1)
    assert len(document["examples"]) == 2
    first = document["examples"][0]
    assert first["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello 0"},
    ]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin.directory("glm-tiny"))
    trained = [i for i, on in zip(first["input_ids"], first["trained"], strict=True) if on]
    assert tokenizer.decode(trained) == "Hello 0<|endoftext|>"
    assert any('"id"' in warning for warning in document["warnings"])


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (b'{"chosen": "a", "rejected": "b"}', (), 65, "preference pairs"),
        (b'{"text": "a", "messages": []}', (), 65, "could be"),
        (b'{"q": "a", "a": "b"}', ("--map", "user=q", "--map", "assistant=a"), 0, ""),
        (b'{"q": "a", "a": "b"}', ("--map", "user"), 2, "role=key is needed"),
        (b'{"text": "a"}', ("--format", "verse"), 2, "is none of messages"),
        (b'{"text": "a"}', ("--max-seq-length", "99999"), 2, "beyond the"),
        (b'{"text": "a"}', ("--max-seq-length", "auto"), 0, ""),
        (b"\x00\xff", (), 65, "is not UTF-8"),
        (b'{"input_ids": [1, 999999]}', (), 65, "the data has the token id 999999"),
    ],
)
def test_data_ends_with_the_exit_code_of_what_is_wrong(
    tmp_path: Path, content: bytes, arguments: tuple[str, ...], code: int, message: str
) -> None:
    path = write(tmp_path / "data.jsonl", content)
    done = autotune("data", path, *arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr


def test_a_process_that_dies_is_told(tmp_path: Path, model_dir: Path) -> None:
    from autotune.dataset.making import Recipe
    from autotune.errors import SetupFaultError

    recipe = Recipe(
        model_dir=model_dir,
        trust_remote_code=False,
        convention="text",
        mapping=(),
        explicit=False,
        limit=100,
        overlong="truncate",
        train_on_prompt=False,
    )
    path = write(tmp_path / "data.jsonl", b'{"text": "a"}')
    pool = workers._Pool(recipe, 1)
    try:
        (process,) = pool._workers.values()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(SetupFaultError, match="exit status -9"):
            list(pool.make(read_blocks(path)))
    finally:
        pool.close()
