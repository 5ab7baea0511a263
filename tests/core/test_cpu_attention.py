"""`cpu_attention.py`: the same attention in blocks, where that is faster."""

import itertools

import pytest
import torch

import cpu_attention
import qwen2vl
from cpu_attention import block_attention
from qwen2vl import AttentionContext, eager_attention, sdpa_attention

# Largest error beside float64, as a share of the largest output.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def random_heads(batch, heads, groups, length, dtype, width=16):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, length, width, dtype=dtype)
    k, v = torch.randn(2, batch, groups, length, width, dtype=dtype)
    return q, k, v


def relative_error(output, q, k, v, causal):
    expected = eager_attention(q.double(), k.double(), v.double(), AttentionContext(causal=causal))
    return (output - expected).abs().max() / expected.abs().max()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK", 32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 31, 32, 70])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_block_attention_is_the_formula(dtype, heads, groups, length, causal):
    q, k, v = random_heads(2, heads, groups, length, dtype)
    with torch.no_grad():
        output = block_attention(q, k, v, causal)
    assert output.dtype == dtype
    assert output.shape == q.shape
    assert relative_error(output, q, k, v, causal) < LIMITS[dtype]


@pytest.mark.usefixtures("small_blocks")
def test_block_attention_takes_any_strides_and_scores_of_any_size():
    q, k, v = random_heads(1, 2, 2, 70, torch.float32)
    q = (300 * q).transpose(1, 2).contiguous().transpose(1, 2)  # as a layer makes it
    k = k.transpose(2, 3).contiguous().transpose(2, 3)
    with torch.no_grad():
        output = block_attention(q, k, v, causal=True)
    assert output.isfinite().all()
    assert relative_error(output, q, k, v, True) < 1e-3  # scores of thousands, to seven digits


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_attention_takes_blocks_for_long_sequences_where_mkl_is_slow(causal, monkeypatch):
    lengths = []

    def recorded(q, k, v, causal):
        lengths.append(q.shape[2])
        return block_attention(q, k, v, causal)

    monkeypatch.setattr(qwen2vl, "block_attention", recorded)
    monkeypatch.setattr(cpu_attention, "LONG", 50)
    context = AttentionContext(causal=causal)
    for is_slow, length, dtype in itertools.product(
        [False, True], [49, 50, 70], [torch.float32, torch.float64]
    ):
        monkeypatch.setattr(cpu_attention, "mkl_is_slow", lambda is_slow=is_slow: is_slow)
        q, k, v = random_heads(1, 4, 2, length, dtype)
        with torch.no_grad():
            output = sdpa_attention(q, k, v, context)
        assert relative_error(output, q, k, v, causal) < 2e-6
    assert lengths == [50, 70]  # float32 alone


def test_sdpa_attention_takes_no_blocks_with_gradients_a_mask_or_dropout(monkeypatch):
    monkeypatch.setattr(qwen2vl, "block_attention", None)
    monkeypatch.setattr(cpu_attention, "LONG", 1)
    monkeypatch.setattr(cpu_attention, "mkl_is_slow", lambda: True)
    q, k, v = random_heads(1, 2, 2, 20, torch.float32)
    sdpa_attention(q, k, v, AttentionContext())
    with torch.no_grad():
        sdpa_attention(q, k, v, AttentionContext(mask=torch.ones(1, 1, 20, 20, dtype=torch.bool)))
        sdpa_attention(q, k, v, AttentionContext(dropout=0.5))


def cpu_info(vendor, family):
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu avx2\n"
    return f"{core}\n{core.replace(str(family), '1')}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpu_info("AuthenticAMD", 26), True),
        (cpu_info("AuthenticAMD", 27), True),
        (cpu_info("AuthenticAMD", 25), False),
        (cpu_info("GenuineIntel", 26), False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", False),
        ("", False),
    ],
)
def test_mkl_is_slow_on_amds_processors_since_zen_5(text, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(cpu_attention, "CPU_INFO", path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_attention.mkl_is_slow.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_attention.mkl_is_slow.__wrapped__()


def test_mkl_is_not_known_to_be_slow_where_the_processor_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_attention, "CPU_INFO", tmp_path / "none")
    assert not cpu_attention.mkl_is_slow.__wrapped__()
