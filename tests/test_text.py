"""Hugging Face encoders: loading, the classifier with and without its table, KFAC over tokens."""

import copy
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from form import ROOT
from torch import nn

import bilevel_lite as bl
from bilevel_lite import text
from bilevel_lite.curvature import GGN
from bilevel_lite.factors import kfac_factors
from bilevel_lite.text import encoders

TEXTS = [
    "What is the capital of Peru ?", "Who wrote it ?", "How far is the moon from the earth today ?",
    "Name a river .", "What does a hypergradient cost ?", "When ?",
]  # fmt: skip
DAMPING, L2 = 0.05, 0.01


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


def classifier(layers=1, pooling="mean", trim=True, encoder=None):
    encoder = encoder or text.tiny(width=8, words=30)
    made = text.TextClassifier(encoder, 3, layers, pooling, generator(1), trim).double()
    with torch.no_grad():  # random weights of 0.02 leave little curvature
        for m in made.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(15)
    return made


def problem_of(model, masked=True):
    inner = bl.WeightedRisk(
        model, weight=lambda lam, b: lam[b[2]], l2=L2, mask=model.mask if masked else None
    )
    return bl.BilevelProblem(inner, bl.WeightedRisk(model))


def batch_of(x):
    return x, torch.arange(len(x)) % 3, torch.arange(len(x))


def ids_of(width=None, texts=TEXTS):
    ids = text.tiny(width=8, words=30).ids(texts)
    return ids if width is None else nn.functional.pad(ids, (0, width - ids.shape[1]))


LAM = torch.linspace(0.2, 1.5, len(TEXTS), dtype=torch.float64)

# ------------------------------------------------------------------ loading


@pytest.mark.slow
def test_only_who_asks_imports_transformers_and_a_broken_torchvision_is_no_obstacle(tmp_path):
    """In a process of its own, with a torchvision that fails as its wheel does over a CPU torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").write_text("")
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "import torchvision.part\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    code = """
import sys
import bilevel_lite
assert "transformers" not in sys.modules
import transformers
asked = transformers.utils.import_utils.is_torchvision_available()
from bilevel_lite import text
assert text.tiny().layers == 2
from transformers import AutoModelForSequenceClassification, BertModel
assert not [name for name in sys.modules if name.startswith("torchvision")]
assert not transformers.utils.import_utils.is_torchvision_available()
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_package_that_does_not_import_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "broken_one").mkdir()
    (tmp_path / "broken_one" / "part.py").write_text("")
    (tmp_path / "broken_one" / "__init__.py").write_text("import broken_one.part\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    assert not encoders._imports("broken_one") and encoders._imports("json")
    with encoders._absent("broken_one"), pytest.raises(ImportError):
        import broken_one  # noqa: F401
    assert set(sys.modules) == before
    text.transformers()
    assert sys.modules.get("torchvision", text) is not None  # as it was: imported, or not there


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No hub, no cache of it, no folder of models."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # refuses at once
    monkeypatch.setattr(encoders, "_cached", lambda name: False)
    for name in ("BILEVEL_LITE_MODELS", "BILEVEL_LITE_DATA", *encoders.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


WORDS = "what is the capital of peru who wrote it how far moon from earth name a river ?".split()


def save(folder, kind="BertModel", words=24, **config):
    """A small model of one's own with its tokenizer, as transformers writes them."""
    tools = text.transformers()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS][:words]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tools.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = tools.BertConfig(
        **{"vocab_size": len(vocabulary), "hidden_size": 8, "num_hidden_layers": 2,
           "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 20,
           **config}
    )  # fmt: skip
    getattr(tools, kind)(config).save_pretrained(folder)
    return folder


def test_an_encoder_from_a_folder(alone, tmp_path):
    folder = save(tmp_path / "models" / "mine")
    state = torch.get_rng_state()
    one = text.encoder(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.name == "mine" and one.max_length == 20 and one.layers == 2 and one.width == 8
    assert one.description.startswith("mine (BertModel, 2 layers, 2 thousand parameters)")
    assert not one.module.training and not any(p.requires_grad for p in one.module.parameters())
    ids = one.ids(["Who wrote it ?", "What is the capital of Peru ?"])
    words = ["[CLS]", "what", "is", "the", "capital", "of", "peru", "?", "[SEP]"]
    assert one.tokenizer.convert_ids_to_tokens(ids[1]) == words
    assert ids.shape == (2, 9) and ids[0, 6:].tolist() == [0, 0, 0] and ids.dtype == torch.int64
    # by default: the folder of models, as itself or as what holds it, or the one beside the data
    for name, place in (
        ("BILEVEL_LITE_MODELS", folder),
        ("BILEVEL_LITE_MODELS", folder.parent),
        ("BILEVEL_LITE_DATA", tmp_path / "data"),
    ):
        with alone.context() as m:
            m.setenv(name, str(place))
            assert text.encoder().name == "mine"
    assert text.encoder().name == "tiny" and "claims nothing" in text.encoder().description


def test_places_that_hold_no_encoder(alone, tmp_path):
    def refused(place, words, **options):
        with pytest.raises(text.EncoderError, match=words):
            text.encoder(place, **options)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "the folder .*empty holds no model")
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")
    refused("../x", "there is no folder")
    folder = save(tmp_path / "mine")
    refused(folder, "max_length: got 21, expected 3 to 20", max_length=21)
    refused(folder, "max_length: got 2,", max_length=2)
    refused(folder, "max_length: got 7.5,", max_length=7.5)
    # a hub that refuses, one that is switched off, one that says nothing: the local one is named
    alone.setenv("BILEVEL_LITE_MODELS", str(folder))
    refused("someone/model", "the hub does not answer .*mine.*tiny")
    with alone.context() as m, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        m.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        m.setattr(encoders, "SECONDS", 0.2)
        refused("someone/model", "the hub does not answer .*mine")
        assert text.encoder().name == "mine"
    alone.setenv("HF_HUB_OFFLINE", "1")
    refused("someone/model", "the hub is switched off")
    # files that do not belong together
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(folder, "holds no encoder with its tokenizer")
    short = save(tmp_path / "short", vocab_size=24)
    save(tmp_path / "long", words=24)
    text.transformers().BertModel(
        text.transformers().BertConfig.from_pretrained(short, vocab_size=20)
    ).save_pretrained(short)
    refused(short, "tokenizer: knows 23 tokens, but the encoder short has embeddings for 20")
    wide = save(tmp_path / "wide", vocab_size=300)
    refused(wide, "tokenizer: knows 23 tokens, but the encoder wide has embeddings for 300")
    assert text.encoder(save(tmp_path / "filled", vocab_size=64)).name == "filled"
    filler = save(tmp_path / "filler", pad_token_id=3)
    refused(filler, "tokenizer: pads with 0, but the encoder filler with 3; .*config.pad_token_id")
    wordless = save(tmp_path / "wordless")
    for file in (*wordless.glob("*token*"), *wordless.glob("vocab*")):
        file.unlink()
    refused(wordless, "wordless holds no tokenizer")
    cut = save(tmp_path / "cut")
    text.transformers().BertConfig.from_pretrained(cut, num_hidden_layers=3).save_pretrained(cut)
    refused(cut, "cut lacks the weights of 'encoder.layer.2")


def test_a_pooler_that_no_file_holds_is_refused(alone, tmp_path):
    one = text.encoder(save(tmp_path / "words", "BertForMaskedLM"))
    with pytest.raises(ValueError, match="pooling: words has no trained pooler"):
        text.TextClassifier(one, 2, pooling="pooler")
    text.TextClassifier(one, 2, pooling="cls")


def test_texts_that_are_none():
    one = text.tiny(max_length=5)
    for texts, words in (
        ([], "an empty list"),
        (["a", " \n"], "number 1 is empty"),
        (["a", 3], "number 1 is int"),
        ("a text", "one string"),
        (7, "got int"),
    ):
        with pytest.raises(ValueError, match=f"texts: .*{words}"):
            one.ids(texts)
    texts = ["a b c d e f", "a b"]
    assert one.lengths(texts).tolist() == [8, 4] and one.ids(texts).shape == (2, 5)
    assert one.ids(texts)[0, -1] == one.tokenizer.sep  # what is cut off is not the last sign
    first, again, other = (text.tiny(seed=s).module for s in (0, 0, 1))
    a, b, c = (m.embeddings.word_embeddings.weight for m in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ------------------------------------------------------------------ the classifier


@pytest.mark.parametrize("pooling", text.POOLINGS)
def test_the_logits_are_those_of_the_encoder_text_by_text(pooling):
    model, ids = classifier(pooling=pooling), ids_of(20)
    whole = model(ids)
    for row, got in zip(ids, whole, strict=True):
        alone = row[row != 0][None]  # no padding at all
        out = model.encoder(input_ids=alone)
        hidden = out.last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "pooler": out.pooler_output[0]}[pooling]
        assert error(got, model.head.weight @ pooled + model.head.bias) < 1e-12


def test_what_is_trained():
    names = {n for n, p in classifier(1).named_parameters() if p.requires_grad}
    assert {n.removeprefix("encoder.encoder.layer.1").split(".")[0] for n in names} == {"", "head"}
    every = {n for n, _ in classifier(1).named_parameters()}
    pooler = {n for n in every if "pooler" in n}
    for pooling, frozen in (("mean", pooler), ("pooler", set())):
        model = classifier("all", pooling)
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    encoder = text.tiny()
    before = copy.deepcopy(encoder.module.state_dict())
    text.TextClassifier(encoder, 3, 1).double().head.weight.data.zero_()
    assert not any(p.requires_grad for p in encoder.module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.module.state_dict().items())
    one, two = (text.TextClassifier(encoder, 3, generator=generator(5)) for _ in range(2))
    assert torch.equal(bl.flatten(one), bl.flatten(two))
    assert "mean pooling; the last layer and the head trained (8,643 parameters)" in one.description


FAMILIES = {
    "Bert": {}, "DistilBert": {"dim": 8, "n_layers": 3, "n_heads": 2, "hidden_dim": 16},
    "Roberta": {"pad_token_id": 1, "max_position_embeddings": 24}, "MPNet": {"pad_token_id": 1},
    "Electra": {"embedding_size": 8}, "ModernBert": {"pad_token_id": 0},
}  # fmt: skip


class Tokens:
    """Ids that are there already, as a tokenizer."""

    model_max_length = 20

    def __init__(self, pad):
        self.pad_token_id = pad

    def __len__(self):
        return 30

    def __call__(self, texts, **_):
        return {"input_ids": [[2, *(5 + len(w) for w in t.split()), 3] for t in texts]}


def family(name):
    tools, own = text.transformers(), FAMILIES[name]
    config = getattr(tools, f"{name}Config")(
        **{"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
           "intermediate_size": 16, "max_position_embeddings": 20, **own}
    )  # fmt: skip
    torch.manual_seed(0)
    module = getattr(tools, f"{name}Model")(config)
    return text.Encoder(module, Tokens(own.get("pad_token_id", 0)), name, 18)


@pytest.mark.parametrize("name", FAMILIES)
def test_remembered_activations_give_the_same(name):
    """Logits and hypergradient from positions are those of the ids, in several architectures."""
    encoder = family(name)
    model = classifier(2, encoder=encoder)
    ids = encoder.ids(TEXTS)
    x = model.remember(ids, torch.float64)
    assert torch.equal(x, torch.arange(len(TEXTS)))
    some = torch.tensor([3, 1, 5])
    assert error(model(x[some]), model(ids[some])) < 1e-12
    width = int((ids[some] != encoder.pad).sum(1).max())
    assert model.mask((x[some],)).shape == (3, width) == model.mask((ids[some],)).shape
    theta = bl.flatten(model)
    one, two = (
        bl.hypergradient(
            problem_of(model), LAM, theta, batch_of(t), batch_of(t), bl.KFAC(DAMPING, "empirical")
        )
        for t in (ids, x)
    )
    assert error(two, one) < 1e-10
    single = model.float()
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        x = single.remember(ids, dtype)
        assert single._table.rows.dtype == dtype
        assert float((single(x) - single(ids)).abs().max()) <= most * float(single(ids).abs().max())
    assert single.double()._table.rows.dtype == torch.float16


def test_the_table_holds_tokens_only_and_frozen_layers_are_not_run_again():
    model, ids = classifier(), ids_of(60)
    x, calls = model.remember(ids, chunk=2), []
    assert len(model._table.rows) == int((ids != 0).sum()) + 1
    for layer in (0, 1):
        model.encoder.encoder.layer[layer].register_forward_hook(
            lambda *_, layer=layer: calls.append(layer)
        )
    h = bl.hypergradient(
        problem_of(model), LAM, bl.flatten(model), batch_of(x), batch_of(x), bl.KFAC(DAMPING)
    )
    assert set(calls) == {1} and bool(h.any())
    assert "_table" not in model.state_dict() and len(copy.deepcopy(model)(x)) == len(x)


def test_what_cannot_be_remembered():
    model, ids = classifier(), ids_of()

    def refused(words, do):
        with pytest.raises(ValueError, match=words):
            do()

    refused("no activations are remembered", lambda: model(torch.arange(3)))
    refused("layers: all are trained", lambda: classifier("all").remember(ids))
    refused("dtype: got torch.int64", lambda: model.remember(ids, torch.int64))
    refused("ids: got positions", lambda: model.remember(torch.arange(3)))
    refused("padding on the right", lambda: model.remember(ids.flip(1)))
    model.train()
    refused("dropout is on", lambda: model.remember(ids))
    model.eval()
    x = model.remember(ids)
    model.train()
    refused("dropout is on", lambda: model(x))
    model(ids)
    model.eval()
    refused("positions from 0 to 6, but 6 texts", lambda: model(torch.arange(7)))
    refused("token ids from 30 to 30, but the encoder has 30", lambda: model(ids[:, :2] * 0 + 30))
    refused("x: got torch.float64", lambda: model(ids.double()))
    refused("layers: got 3, expected 1 to 2", lambda: classifier(3))
    refused("pooling: got 'max'", lambda: classifier(pooling="max"))
    # an encoder that does more between its layers than call them
    model = classifier()
    below, above = model._halves
    model._halves = below, Twice(above)
    refused("cannot be cut between two layers", lambda: model.remember(ids))
    refused("no activations are remembered", lambda: model(torch.arange(3)))


class Twice(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, inputs_embeds, **more):
        return self.inside(inputs_embeds=2 * inputs_embeds, **more)


# ------------------------------------------------------------------ curvature


def jacobian(model, ids):
    """d logits / d theta, shape (n, C, d), one backward pass an entry."""
    params = [p for p in model.parameters() if p.requires_grad]
    logits = model(ids)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(z, params, retain_graph=True)])
        for z in logits.reshape(-1)
    ]
    return torch.stack(rows).view(*logits.shape, -1), logits.detach()


def softmax_hessian(logits):
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def factors_by_hand(model, ids):
    """A and B of every trained linear map, from hooks: tokens only, and the exact Fisher."""
    seen, hooks = {}, []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and m.weight.requires_grad:
            hooks.append(
                m.register_forward_hook(lambda m, a, z, name=name: seen.update({name: (a[0], z)}))
            )
    logits = model(ids)
    for hook in hooks:
        hook.remove()
    h, real, n = softmax_hessian(logits.detach()), ids != 0, len(ids)
    out = {}
    for name, (a, z) in seen.items():
        a = torch.cat([a.detach(), a.new_ones(*a.shape[:-1], 1)], -1)
        rows = a[real[:, : a.shape[1]]] if a.dim() == 3 else a
        g = [torch.autograd.grad(logits[:, c].sum(), z, retain_graph=True)[0] for c in range(3)]
        g = torch.stack(g, 1).view(n, 3, -1, z.shape[-1])  # (n, C, T, d1): row i of example i only
        b = torch.einsum("i,icd,icte,idtf->ef", LAM, h, g, g) / n
        out[name] = rows.T @ rows / len(rows), b
    return out


CUTS = {"padded": ids_of(), "padded to 30": ids_of(30), "no padding": ids_of(texts=TEXTS[:1] * 6)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layers", [1, "all"])
def test_curvature_of_an_encoder_is_the_algebra(layers, cut):
    """GGN, factors and the solve against dense matrices made here; with and without padding."""
    model, ids = classifier(layers, trim=False), CUTS[cut]
    assert ids.shape[1] != model.head.in_features or cut == "no padding"
    theta, batch, problem = bl.flatten(model), batch_of(ids), problem_of(model)
    j, logits = jacobian(model, ids)
    half = torch.linalg.eigh(softmax_hessian(logits))
    root = half.eigenvectors * half.eigenvalues.clamp(min=0).sqrt()[:, None, :]
    probes = torch.einsum("i,ick,icd->ikd", LAM.sqrt(), root, j).reshape(-1, len(theta))
    at = problem.inner_loss, LAM, theta, batch
    b = torch.randn(len(theta), generator=generator(3), dtype=torch.float64)
    ggn_b = probes.T @ (probes @ b) / len(ids) + 2 * L2 * b
    assert error(GGN(*at) @ b, ggn_b) < 1e-10

    made, truth = kfac_factors(*at, fisher="exact"), factors_by_hand(model, ids)
    assert set(made) == set(truth) and len(made) == (7 if layers == 1 else 13)
    for name in made:
        for one, two in zip(made[name], truth[name], strict=True):
            assert error(one, two) < 1e-10, name

    tau, v = DAMPING + 2 * L2, torch.zeros_like(theta)
    diagonal, place = probes.square().sum(0) / len(ids), 0
    places = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            places[name] = slice(place, place := place + p.numel())
    for name, where in places.items():
        owner, _, kind = name.rpartition(".")
        if owner not in truth:
            v[where] = b[where] / (diagonal[where] + tau)  # LayerNorm, embeddings: the GGN's own
        elif kind == "weight":
            a, g = truth[owner]
            both = torch.cat([b[where].view(len(g), -1), b[places[f"{owner}.bias"]][:, None]], 1)
            dense = torch.kron(g.contiguous(), a.contiguous()) + tau * torch.eye(
                both.numel(), dtype=torch.float64
            )
            solved = torch.linalg.solve(dense, both.reshape(-1)).view(both.shape)
            v[where], v[places[f"{owner}.bias"]] = solved[:, :-1].reshape(-1), solved[:, -1]
    solver = bl.KFAC(DAMPING, "exact", damping_rule="exact")
    got, info = solver.solve(problem, LAM, theta, batch, b)
    assert error(got, v) < 1e-10
    rest = {name for name in places if name.rpartition(".")[0] not in truth}
    assert set(info.without_block) == rest
    assert any("LayerNorm" in name for name in rest)
    positions = "encoder.embeddings.position_embeddings.weight"
    assert (positions in rest) == (layers == "all")


@pytest.mark.parametrize("layers", [1, "all"])
def test_padding_changes_no_hypergradient_under_the_mask(layers):
    """The same sentences trimmed, and padded to 100; without the mask KFAC's would be another."""
    model = classifier(layers, trim=False)
    theta = bl.flatten(model)

    def h(solver, width, masked=True):
        batch = batch_of(ids_of(width))
        return bl.hypergradient(problem_of(model, masked), LAM, theta, batch, batch, solver)

    for solver, width in (
        (bl.KFAC(DAMPING, "exact"), 100), (bl.KFAC(DAMPING, "empirical"), 100),
        (bl.EKFAC(DAMPING, "exact"), 30), (bl.CG(3, damping=DAMPING, curvature="ggn"), 30),
    ):  # fmt: skip
        truth = h(solver, None)
        assert bool(truth.any()) and error(h(solver, width), truth) < 1e-10
    short, long = (h(bl.KFAC(1e-3, "empirical"), width, False) for width in (None, 100))
    assert error(long, short) > 1e-3
    trimmed = classifier(layers)
    problem, batch = problem_of(trimmed), batch_of(ids_of(100))
    got = bl.hypergradient(problem, LAM, theta, batch, batch, bl.KFAC(DAMPING, "exact"))
    assert error(got, h(bl.KFAC(DAMPING, "exact"), None)) < 1e-10


def test_a_mask_as_wide_as_the_head_is_not_taken_for_its_inputs():
    """Texts of 8 tokens in an encoder of width 8: the head's inputs (n, 8) have no padding."""
    model, ids = classifier(trim=False), ids_of(8, [t for t in TEXTS if len(t.split()) < 7])
    problem, batch = problem_of(model), batch_of(ids)
    a, _ = kfac_factors(problem.inner_loss, LAM, bl.flatten(model), batch)["head"]
    seen = []
    model.head.register_forward_hook(lambda m, x, z: seen.append(x[0].detach()))
    model(ids)
    rows = torch.cat([seen[0], torch.ones(len(ids), 1)], 1)
    assert ids.shape[1] == 8 and error(a, rows.T @ rows / len(ids)) < 1e-12


# ------------------------------------------------------------------ attention


def switches():
    cuda = torch.backends.cuda
    return cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()


def attention_pair():
    """The same classifier with its default attention, and with the one that is plain code."""
    model = classifier()
    plain = copy.deepcopy(model)
    plain.encoder.set_attn_implementation("eager")
    assert model.encoder.config._attn_implementation == "sdpa"
    return model, plain


SOLVERS = {
    "identity": lambda: bl.Identity(0.1),
    "CG": lambda: bl.CG(5, damping=DAMPING),
    "CG, GGN": lambda: bl.CG(5, damping=DAMPING, curvature="ggn"),
    "CG, normal": lambda: bl.CGNormal(5, damping=DAMPING),
    "Neumann": lambda: bl.Neumann(5, 0.1),
    "KFAC": lambda: bl.KFAC(DAMPING),
    "KFAC, empirical": lambda: bl.KFAC(DAMPING, "empirical"),
    "EKFAC": lambda: bl.EKFAC(DAMPING),
    "CG after KFAC": lambda: bl.CG(3, damping=DAMPING, precondition=bl.KFAC(DAMPING)),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_passes_the_default_attention(name):
    model, plain = attention_pair()
    theta, batch, was = bl.flatten(model), batch_of(ids_of()), switches()
    got, truth = (
        bl.hypergradient(problem_of(m), LAM, theta, batch, batch, SOLVERS[name]())
        for m in (model, plain)
    )
    assert error(got, truth) < 1e-10
    assert switches() == was


def test_methods_pass_the_default_attention():
    model, plain = attention_pair()
    batch, was, theta = batch_of(ids_of()), switches(), bl.flatten(model)
    rates = {"inner_lr": 0.05, "outer_lr": 0.1}
    for make in (
        lambda p, **b: bl.AID(p, LAM, theta, bl.Neumann(2, 0.1), inner_steps=2, **rates, **b),
        lambda p, **b: bl.ITD(p, LAM, theta, inner_steps=2, **rates, **b),
        lambda p, **b: bl.SAMA(p, LAM, theta, inner_steps=2, **rates, **b),
        lambda p, **b: bl.SOBA(p, LAM, theta, linear_lr=0.1, **rates, **b),
    ):
        one, two = (
            make(problem_of(m), inner_batch=batch, outer_batch=batch) for m in (model, plain)
        )
        for _ in range(2):  # SOBA's first direction is zero
            got, truth = one.step().hypergradient, two.step().hypergradient
        assert error(got, truth) < 1e-9 and bool(truth.any())
    assert switches() == was


def test_check_and_unrolling_pass_the_default_attention():
    model, was = attention_pair()[0], switches()
    for name, p in model.named_parameters():
        p.requires_grad_("query.bias" in name and "layer.1" in name or name == "head.weight")
    theta, batch, problem = bl.flatten(model), batch_of(ids_of()), problem_of(model)
    said = bl.check(problem, LAM, theta, batch, batch, bl.CG(60, damping=2.0))
    assert said.relative_error_exact > 1e-3  # of the damping
    said = bl.check(problem, LAM, theta, batch, batch, bl.Direct())
    assert said.relative_error_exact < 1e-9
    one, two = (
        bl.unrolled_hypergradient(
            problem, LAM, theta, steps=2, lr=0.1, mode=mode, inner_batch=batch, outer_batch=batch
        )
        for mode in ("reverse", "forward")
    )
    assert error(two, one) < 1e-10
    assert switches() == was


# ------------------------------------------------------------------ a classifier of one's own


def test_the_lines_of_the_readme_learn_weights():
    """A tiny sequence classifier, one wrong label of eight: its weight falls, the others rise."""
    section = (ROOT / "README.md").read_text("utf-8").split("## With Hugging Face")[1]
    lines = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 14
    tools = text.transformers()
    config = tools.BertConfig(  # one tensor of ids is what the package takes as x
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20, num_labels=2,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = tools.AutoModelForSequenceClassification.from_config(config)
    words = text.tiny(words=30)
    texts = [" ".join([w] * k) for w in ("good", "bad") for k in (1, 2, 3, 4)]
    right = torch.arange(8) // 4
    wrong = right.clone()
    wrong[2] = 1
    names = {
        "ids": words.ids(texts), "labels": wrong, "val_ids": words.ids(texts), "val_labels": right,
        "classifier": whole,
    }  # fmt: skip
    code = lines.replace("range(50)", "range(8)")
    assert code != lines
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    batch = {"input_ids": names["ids"]}, wrong, torch.arange(8)
    with pytest.raises(ValueError, match="got dict as x, expected a tensor"):
        names["train"](names["method"].lam, names["method"].theta, batch)
    weights = names["method"].lam
    others = torch.cat([weights[:2], weights[3:]])
    assert float(weights[2]) < 0.1 and float(others.min()) > 0.5


@pytest.mark.parametrize("kind", ["classifier", "logits", "RoBERTa"])
def test_ids_that_no_tokenizer_gives_are_refused_in_a_sentence(kind):
    """Of another vocabulary, of padding alone, too many: by the model, and by a risk over it."""
    tools, pad = text.transformers(), 1 if kind == "RoBERTa" else 0
    if kind == "classifier":
        model, words, most = classifier(trim=False), 30, 128
    else:
        config = getattr(tools, "RobertaConfig" if pad else "BertConfig")(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=20, num_labels=3,
        )  # fmt: skip
        whole = tools.AutoModelForSequenceClassification.from_config(config)
        model, words, most = text.Logits(whole), 9, 18 if pad else 20
    risk, theta = bl.WeightedRisk(model), bl.flatten(model)
    good = torch.tensor([[2, 5, 3], [2, 3, pad]])
    empty, some = torch.full((8, 3), pad), torch.full((2, most + 1), 4)
    empty[4] = 4
    for x, said in (
        (good + words, f"x: token ids from {words + pad} to {words + 5}, but .* has {words};"),
        (torch.tensor([[2, -3, 5]]), "x: token ids from -3 to 5"),
        (empty, "the texts in rows 0, 1, 2, 3, 5 and 2 more are empty, padding alone; leave them"),
        (some, f"too long, {most + 1} tokens, and .* at most {most}; .*max_length={most}"),
    ):
        for call in (
            lambda x=x: model(x),
            lambda x=x: risk(torch.zeros(0), theta, (x, torch.zeros(len(x), dtype=torch.long))),
        ):
            with pytest.raises(ValueError, match=said):
                call()
    assert model(good).shape == (2, 3) and model(some[:, :most]).shape == (2, 3)
    if kind == "RoBERTa":  # counts tokens alone, so more padding is no matter
        assert torch.allclose(model(nn.functional.pad(good, (0, 30), value=pad)), model(good))


# ------------------------------------------------------------------ a pretrained one

LOCAL = Path(os.environ.get("BILEVEL_LITE_DATA", "nowhere")).resolve().parent / "models/minilm-l6"


@pytest.mark.skipif(not LOCAL.exists(), reason="no pretrained encoder beside BILEVEL_LITE_DATA")
def test_a_pretrained_encoder():
    encoder = text.encoder(LOCAL)
    assert encoder.description == "minilm-l6 (BertModel, 6 layers, 22.7 M parameters)"
    ids = encoder.ids(TEXTS)
    words = encoder.tokenizer.convert_ids_to_tokens(ids[1].tolist())
    assert words[:6] == ["[CLS]", "who", "wrote", "it", "?", "[SEP]"]
    model = text.TextClassifier(encoder, 6, generator=generator())
    assert len(bl.flatten(model)) == 1_776_774
    whole = model(ids)
    assert float((model(model.remember(ids)) - whole).abs().max()) < 1e-5
    short = model(model.remember(ids, torch.float16))
    assert 1e-7 < float((short - whole).abs().max()) < 1e-3
    # texts of one meaning are near: the weights are the pretrained ones
    model = text.TextClassifier(encoder, 1)
    said = encoder.ids(["A man is eating food.", "A man eats something.", "The sky is blue today."])
    out = encoder.module(input_ids=said, attention_mask=(said != 0).long()).last_hidden_state
    mean = nn.functional.normalize(
        model._pooled(type("", (), {"last_hidden_state": out}), said != 0)
    )
    assert float(mean[0] @ mean[1]) > float(mean[0] @ mean[2]) + 0.3


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_classifiers_and_heads_are_made_and_fitted_where_gradients_are_off(off):
    def made():
        draws, encoder = torch.Generator().manual_seed(0), text.tiny()
        every = text.TextClassifier(encoder, 2, layers="all", generator=draws)
        hidden = text.hide(encoder, ["Which city ?", "Who built it ?"], draws)
        words = text.MaskedWords(every, hidden, generator=draws)
        return every.description, words.fit(hidden.y, 3, draws)

    here = made()
    with off():
        assert made() == here


def test_hidden_words_need_a_generator_and_a_batch():
    draws, encoder = torch.Generator().manual_seed(0), text.tiny()
    hidden = text.hide(encoder, ["Which city ?"], draws)
    words = text.MaskedWords(text.TextClassifier(encoder, 2, generator=draws), hidden)
    for bad in (None, 0):
        for call in (
            lambda bad=bad: text.hide(encoder, ["Which city ?"], bad),
            lambda bad=bad: words.fit(hidden.y, 3, bad),
        ):
            with pytest.raises(TypeError, match="generator: got .*, expected a torch.Generator"):
                call()
    with pytest.raises(ValueError, match="size: got 0, expected an integer of at least 1"):
        words.fit(hidden.y, 3, draws, size=0)


def test_what_is_remembered_goes_stale_aloud():
    words = text.tiny()
    ids = words.ids(["Which city ?", "How many bridges has it ?", "Who was it ?"])

    def made():
        return text.TextClassifier(words, 3, generator=torch.Generator().manual_seed(0))

    one, other = made(), made()
    with torch.no_grad():
        for p in other.encoder.parameters():
            p.add_(0.1)
    positions = one.remember(ids)
    for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.double()):  # noqa: S301
        assert torch.allclose(same(positions), same(ids), atol=1e-5)
    one.float().load_state_dict(copy.deepcopy(one.state_dict()))  # the same values
    assert torch.allclose(one(positions), one(ids), atol=1e-5)
    one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="have changed since"):
        one(positions)
    assert torch.allclose(one(one.remember(ids)), one(ids), atol=1e-5)
    one.encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="are trained now"):
        one(positions)
    one = made()
    for wrong, said in ((positions, "got positions"), ([1], "x: got list"), (ids[:0], "no texts")):
        with pytest.raises(ValueError, match=said):
            one.remember(wrong)
    with pytest.raises(ValueError, match="chunk"):
        one.remember(ids, chunk=0)


def test_the_first_token_is_no_padding():
    words = text.tiny()
    ids = words.ids(["Which city ?", "How many bridges has it ?"])
    left = torch.nn.functional.pad(ids, (2, 0), value=words.pad)
    first = text.TextClassifier(words, 3, pooling="cls", generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="begins with padding"):
        first(left)
