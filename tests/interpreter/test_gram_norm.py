import pytest
import torch
import triton.language as tl

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.test_gram_norm import factors, squared_norms, torch_grams
from tests.tolerances import assert_no_worse
from tests.update_cases import DTYPES
from ttt_fast import TTTConfig, TTTTrainer, ops
from ttt_fast.kernels import gram_norm, gram_norms, pointer_table
from ttt_fast.kernels.gram_norm import gram_norm_launch
from ttt_fast.kernels.gram_norms import gram_norms_launch

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Batch, tokens, in, out. Tiles have 16 tokens where programs are few; rounds are 128 bytes wide.
SHAPES = [(1, 1, 1, 1), (2, 7, 5, 3), (3, 20, 137, 50), (1, 33, 72, 1), (2, 40, 48, 136)]


@pytest.fixture
def large_tiles(monkeypatch):
    """Choose tiles as where there are programs enough."""
    monkeypatch.setattr(gram_norm, "ENOUGH_PROGRAMS", 1)


def assert_right(actual, x, dy):
    assert_no_worse(actual, torch_grams(x, dy), squared_norms(x, dy, torch.float64))


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_norm_of_the_gradient(dtype, shape):
    x, dy = factors(*shape, dtype)
    assert_right(ops.gram_norm(x, dy, backend="triton"), x, dy)


@dtypes
@pytest.mark.parametrize("tokens", [20, 70], ids=str)
def test_large_tiles(large_tiles, dtype, tokens):
    x, dy = factors(2, tokens, 72, 24, dtype)
    assert_right(gram_norm_launch(x, dy), x, dy)


def test_a_tile_that_nobody_computes_is_noticed(monkeypatch):
    x, dy = factors(2, 40, 24, 16, torch.float32)
    options, tiles = gram_norm.options_for(40, 2, torch.float32)
    assert tiles == 6
    monkeypatch.setattr(gram_norm, "options_for", lambda *_: (options, tiles - 1))
    with pytest.raises(AssertionError, match="the oracle"):
        assert_right(gram_norm_launch(x, dy), x, dy)


@pytest.mark.parametrize(
    ("tokens", "deltas", "dtype", "tile"),
    [
        (1, 1, torch.bfloat16, 16),
        (64, 1, torch.bfloat16, 16),
        (64, 50, torch.bfloat16, 32),
        (64, 200, torch.bfloat16, 64),
        (20, 200, torch.bfloat16, 32),
        (16, 200, torch.bfloat16, 16),
        (2000, 1, torch.bfloat16, 64),
        (2000, 1, torch.float64, 32),
    ],
)
def test_tiles_are_as_large_as_leaves_enough_programs(tokens, deltas, dtype, tile):
    assert gram_norm.options_for(tokens, deltas, dtype)[0]["TILE"] == tile


@dtypes
def test_views(dtype):
    x, dy = factors(4, 30, 56, 64, dtype)
    for change in (
        lambda t: t[1:3, 4:25, 8:40],  # aligned, read where it lies
        lambda t: t[1:3, 4:25, 3:41],
        lambda t: t[::2, ::3, ::2],
        lambda t: t.transpose(0, 1)[:3],
        lambda t: t[:1, :5].expand(3, -1, -1),
    ):
        a, b = change(x), change(dy)
        assert_right(gram_norm_launch(a, b), a, b)


def test_only_odd_rows_are_copied():
    x, _ = factors(2, 5, 48, 1, torch.bfloat16)
    for view in (x, x[:, 1:3, 8:32], x[:1], x[:, :1, 16:]):
        assert gram_norm.aligned(view) is view
    for view in (x[:, :, 1:33], x[:, :, :47], x[:, :, ::2]):
        copy = gram_norm.aligned(view)
        assert copy.shape[2] % 8 == 0
        assert torch.equal(copy[:, :, : view.shape[2]], view)
        assert not copy[:, :, view.shape[2] :].any()


@dtypes
def test_touches_nothing_outside(fenced, dtype):
    x, dy = factors(2, 35, 40, 24, dtype)
    expected = gram_norm_launch(x, dy)
    assert torch.equal(gram_norm_launch(fenced(x), fenced(dy)), expected)


def test_the_order_of_programs_changes_no_bit(program_order):
    x, dy = factors(2, 40, 24, 16, torch.float32)
    results = []
    for seed in range(3):
        with program_order(seed):
            results.append(gram_norm_launch(x, dy))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tokens_that_cancel_never_give_a_negative_number(large_tiles):
    x, dy = factors(10, 17, 9, 7, torch.float32)
    x, dy = torch.cat([x, x], 1), torch.cat([dy, -dy], 1)
    norms = [gram_norm_launch(x, dy), gram_norm_launch(x.repeat(1, 2, 1), dy.repeat(1, 2, 1))]
    for norm in norms:  # of one tile of 64 tokens, and of three
        assert (norm >= 0).all()
        assert (norm < 1e-4).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("tokens", [5, 20])
def test_what_is_not_finite_shows_in_its_delta_alone(tokens):
    x, dy = factors(4, tokens, 9, 7, torch.float32)
    finite = gram_norm_launch(x, dy)
    x[1, 2, 3], dy[3, 4, 6] = torch.nan, torch.inf
    actual = gram_norm_launch(x, dy)
    assert actual.isfinite().tolist() == [True, False, True, False]
    assert torch.equal(actual[::2], finite[::2])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape):
    x, dy = factors(*shape, torch.bfloat16)
    assert torch.equal(gram_norm_launch(x, dy), torch.zeros(shape[0]))
    whole = factors(*shape[:2], 8, 8, torch.bfloat16)
    together = gram_norms_launch(*zip((x, dy), whole, strict=True))
    assert together.shape == (2, shape[0]) and not together[0].any()


# ---------------------------------------------------------------------------- many pairs


@pytest.fixture
def tables(monkeypatch):
    """The tables that are uploaded from now on."""
    uploads = []
    real = pointer_table._pinned
    monkeypatch.setattr(pointer_table, "_pinned", lambda *args: uploads.append(args) or real(*args))
    return uploads


def lists(pairs):
    return [list(tensors) for tensors in zip(*pairs, strict=True)]


@dtypes
def test_many_pairs_in_one_launch(dtype, fenced):
    pairs = [factors(2, 20, *w, dtype, seed=i) for i, w in enumerate([(24, 40), (11, 3), (8, 8)])]
    alone = torch.stack([gram_norm_launch(*pair) for pair in pairs])
    for _ in range(2):  # the second time with a table that is there
        assert torch.equal(ops.gram_norms(*lists(pairs), backend="triton"), alone)
    pairs = [(fenced(x), fenced(dy)) for x, dy in pairs]
    assert torch.equal(gram_norms_launch(*lists(pairs)), alone)


def test_a_pair_in_place_of_another_is_noticed(monkeypatch):
    pairs = [factors(2, 20, 24, 40, torch.float32, seed=i) for i in range(2)]
    alone = torch.stack([gram_norm_launch(*pair) for pair in pairs])
    monkeypatch.setattr(gram_norms, "NUMBERS", tl.constexpr(0))
    assert not torch.equal(gram_norms_launch(*lists(pairs)), alone)


def rows_of_a_step(buffers, deltas, start, count):
    return [buffer[deltas, start : start + count] for buffer in buffers]


@pytest.mark.parametrize("odd", [False, True], ids=["in buffers", "some are copied"])
def test_the_rows_of_every_step_have_one_table(tables, odd):
    """They begin at the same row of all buffers, whatever the step."""
    xs = [torch.randn(3, 40, w, dtype=torch.bfloat16) for w in (16, 24)]
    dys = [torch.randn(3, 40, w, dtype=torch.bfloat16) for w in (8, 24 - odd)]
    for start in range(0, 40, 8):
        x, dy = (rows_of_a_step(each, slice(1, 3), start, 8) for each in (xs, dys))
        expected = torch.stack([gram_norm_launch(*pair) for pair in zip(x, dy, strict=True)])
        assert torch.equal(gram_norms_launch(x, dy), expected)
    # Copies lie where the allocator puts them.
    assert odd or len(tables) == 1


def test_buffers_that_moved_have_another_table(tables):
    pair = factors(1, 5, 8, 8, torch.float32)
    for _ in range(2):
        gram_norms_launch(*lists([pair]))
    assert len(tables) == 1
    moved = [t.clone() for t in pair]
    assert torch.equal(gram_norms_launch(*lists([moved])), gram_norms_launch(*lists([pair])))
    assert len(tables) == 2


def test_deltas_with_other_numbers_of_rows_have_one_table_too(tables):
    """As where some sat a step out: then each is a pair of its own."""
    x, dy = (torch.randn(2, 40, w) for w in (16, 8))
    for step in range(4):
        starts = [(0, 8 * step), (1, 8 * step + 5)]
        rows = [[each[d : d + 1, s : s + 8] for d, s in starts] for each in (x, dy)]
        expected = torch.stack([gram_norm_launch(*pair) for pair in zip(*rows, strict=True)])
        assert torch.equal(gram_norms_launch(*rows), expected)
    assert len(tables) == 1


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_norms_of_the_steps_of_a_session(monkeypatch, tables, engine):
    """With both engines what the C++ gives; factors lie in buffers, whose table is made once."""
    config = TTTConfig(steps=3, lr=1e-2, max_grad_norm=1.0, engine=engine)
    # An odd vocabulary would be copied at every step.
    trainer = TTTTrainer(tiny_model("llama_tied", vocab_size=104), config)
    with trainer.adapt(prompt_ids(9)) as adapted:
        expected = adapted.grad_norms
    real, calls = ops.gram_norms, []

    @torch.no_grad()
    def in_triton(xs, dys, backend):
        before = len(tables)
        norms = real(xs, dys, backend="triton")
        calls.append((len(xs), len(tables) - before))
        return norms

    monkeypatch.setattr(ops, "gram_norms", in_triton)
    for _ in range(2):
        with trainer.adapt(prompt_ids(9)) as adapted:
            torch.testing.assert_close(adapted.grad_norms, expected, rtol=1e-5, atol=0)
    # On a CPU the head has tokens with a label alone; it is tied, so it comes first.
    others = 7 * trainer.model.config.num_hidden_layers
    assert [n for n, _ in calls] == [1, others] * 6
    if engine == "factored":
        assert [uploads for _, uploads in calls] == [1, 1] + [0] * 10
