"""Second-order scores against the dense matrices, and against training without the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import gradstore
from gradstore.capture.layers import describe, linear_layers, parameter
from gradstore.errors import InfluenceError, SettingsError
from gradstore.factored import FactoredGradient, Term
from gradstore.influence import predictions
from gradstore.influence.curvature import GaussNewton
from gradstore.influence.hvp import Hessian, largest_eigenvalue, lissa, solve
from gradstore.influence.layers import gradients_of
from gradstore.influence.predictions import flat, parts
from gradstore.influence.query import Query, gradient_of
from gradstore.influence.solved import by_fisher, by_products
from gradstore.influence.top import Settings, influences, tokens_of
from gradstore.store import Store
from gradstore.unlearn.controls import fresh

pytest_plugins = ["tiny"]
VOCABULARY, WIDTH = 40, 8  # 320 parameters of the embedding
DAMPING = 0.5


def tiny(*, tied: bool = True, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    return models.tiny(tied=tied, **sizes, **changes).double().eval()


def samples(count: int = 4) -> list[Tensor]:
    return [torch.randint(2, VOCABULARY, (3 + at,)) for at in range(count)]


def summed(network: nn.Module, tokens: Tensor, weight: Tensor) -> Tensor:
    """A sample's loss with another embedding, by itself."""
    [name] = [n for n, w in network.named_parameters() if w is embedding(network)]
    logits = functional_call(network, {name: weight}, (tokens[None],)).logits[0, :-1]
    return cross_entropy(logits, tokens[1:], reduction="sum")


def logits_of(network: nn.Module, tokens: Tensor, weight: Tensor) -> Tensor:
    [name] = [n for n, w in network.named_parameters() if w is embedding(network)]
    found: Tensor = functional_call(network, {name: weight}, (tokens[None],)).logits[0, :-1]
    return found


def embedding(network: Any) -> Tensor:
    weight: Tensor = network.get_input_embeddings().weight
    return weight


def dense_hessian(network: nn.Module, some: list[Tensor]) -> Tensor:
    size, weight = VOCABULARY * WIDTH, embedding(network).detach()
    total = torch.zeros(size, size, dtype=weight.dtype)
    for tokens in some:
        with sdpa_kernel(SDPBackend.MATH):
            total += hessian(partial(summed, network, tokens))(weight).reshape(size, size)
    return total.detach() / sum(len(tokens) - 1 for tokens in some)


def dense_gauss_newton(network: nn.Module, some: list[Tensor]) -> Tensor:
    size, weight = VOCABULARY * WIDTH, embedding(network).detach()
    total = torch.zeros(size, size, dtype=weight.dtype)
    for tokens in some:
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(partial(logits_of, network, tokens))(weight).flatten(2)
        chances = logits_of(network, tokens, weight).softmax(-1)
        for of_position, p in zip(jacobian, chances, strict=True):
            total += of_position.T @ (torch.diag(p) - torch.outer(p, p)) @ of_position
    return total.detach() / sum(len(tokens) - 1 for tokens in some)


def dense_over(kind: Any, network: nn.Module, some: list[Tensor], names: Sequence[str]) -> Tensor:
    """The dense matrix of some weights in one vector, by autograd, one sample at a time."""
    weights = {name: parameter(network, name).detach() for name in names}
    own = {id(weight): name for name, weight in network.named_parameters()}
    places = {own[id(parameter(network, name))]: name for name in names}

    def logits(tokens: Tensor, at: Tensor) -> Tensor:
        split = parts(at, weights)
        moved = {place: split[name] for place, name in places.items()}
        found: Tensor = functional_call(network, moved, (tokens[None],)).logits[0, :-1]
        return found

    def loss(tokens: Tensor, at: Tensor) -> Tensor:
        return cross_entropy(logits(tokens, at), tokens[1:], reduction="sum")

    start = flat(weights)
    total = torch.zeros(len(start), len(start), dtype=start.dtype)
    for tokens in some:
        with sdpa_kernel(SDPBackend.MATH):
            if kind is Hessian:
                total += hessian(partial(loss, tokens))(start).detach()
                continue
            jacobian = jacrev(partial(logits, tokens))(start).detach()
        for of_position, p in zip(jacobian, logits(tokens, start).softmax(-1), strict=True):
            total += of_position.T @ (torch.diag(p) - torch.outer(p, p)) @ of_position
    return total.detach() / sum(len(tokens) - 1 for tokens in some)


DENSE: dict[Any, Callable[[nn.Module, list[Tensor]], Tensor]] = {
    Hessian: dense_hessian,
    GaussNewton: dense_gauss_newton,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_are_those_of_the_dense_matrix(
    kind: Any, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, some = tiny(tied=tied), samples()
    dense, v = DENSE[kind](network, some), torch.randn_like(embedding(network))
    for entries in (1, 2**25):  # a sample at a time, or all at once
        monkeypatch.setattr(predictions, "ENTRIES", entries)
        product = kind(network, some)(v)
        assert models.relative(product.flatten(), dense @ v.flatten()) < 1e-8
    assert embedding(network).grad is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_over_many_weights_are_those_of_one_dense_matrix(kind: Any, tied: bool) -> None:
    """Autograd over all captured weights in one vector, one sample at a time."""
    sizes: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "max_position_embeddings": 8}
    network = models.tiny(tied=tied, vocab_size=VOCABULARY, **sizes).double().eval()
    some = samples(3)
    layers = describe(linear_layers(network, "blocks"))
    names = ["embedding", "position"] + ["head"] * (not tied)
    names += [f"{of.layer}.{part}" for of in layers for part in ("weight", "bias")]
    weights = {name: parameter(network, name).detach() for name in names}
    v = torch.randn_like(flat(weights))
    expected = dense_over(kind, network, some, names) @ v
    found = kind(network, some, names)(v)
    assert models.relative(found, expected) < 1e-8
    single = kind(network.float(), some, names)(v.float())
    assert models.relative(single.double(), expected) < 1e-4
    assert {name: part.shape for name, part in parts(found, weights).items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    with pytest.raises(ValueError, match="some of these are one weight, name it once: embedding"):
        kind(network, some, ["embedding", "head" if tied else "transformer.wte.weight"])


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_single_precision_products_and_solutions(kind: Any) -> None:
    network, some = tiny(), samples()
    dense, v = DENSE[kind](network, some), torch.randn_like(embedding(network)).float()
    product = kind(network.float(), some)
    damping = DAMPING - min(0.0, float(torch.linalg.eigvalsh(dense)[0]))
    dense_and = dense + damping * torch.eye(len(dense), dtype=dense.dtype)
    expected = torch.linalg.solve(dense_and, v.double().flatten())
    assert models.relative(product(v).double().flatten(), dense @ v.double().flatten()) < 1e-4

    solved = solve(product, v, damping, iterations=200, tolerance=1e-6)
    assert models.relative(solved.x.double().flatten(), expected) < 1e-4
    assert solved.residual <= 1e-6

    scale = 1.1 * (largest_eigenvalue(product, v) + damping)
    series = lissa(product, v, damping, scale=scale, depth=1000, tolerance=1e-5)
    assert models.relative(series.x.double().flatten(), expected) < 1e-4
    assert series.residual <= 1e-5 < series.residuals[-2]
    missing = product(series.x) + damping * series.x - v
    assert float(missing.norm() / v.norm()) == pytest.approx(series.residual, rel=0.1)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_lissa_is_its_series(seed: int, depth: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    root, b = torch.randn(2, 4, 4, generator=draw, dtype=torch.float64)
    A = root @ root.T
    scale = float(torch.linalg.matrix_norm(A, 2)) + 0.5
    series, power = torch.zeros_like(b), b / scale
    for _ in range(depth):
        series, power = series + power, power - (A @ power + 0.1 * power) / scale
    found = lissa(lambda v: A @ v, b, 0.1, scale=scale, depth=depth)
    assert found.iterations == depth
    assert torch.allclose(found.x, series)
    assert list(found.residuals) == sorted(found.residuals, reverse=True)
    estimate = largest_eigenvalue(lambda v: A @ v, b, iterations=300)
    assert estimate == pytest.approx(scale - 0.5, rel=1e-2)


def test_lissa_stops_where_it_diverges_and_conjugate_gradients_refuse_what_is_indefinite() -> None:
    def operator(v: Tensor) -> Tensor:
        return torch.tensor([[3.0], [-1.0]]) * v

    b = torch.ones(2, 1)
    for scale in (0.5, 4.0):  # too small, and none would do
        found = lissa(operator, b, 0.1, scale=scale, depth=10_000)
        assert found.residual >= 10
        assert found.iterations < 200
    with pytest.raises(ValueError, match=r"not positive definite .* damp it more"):
        solve(operator, torch.tensor([[0.0], [1.0]]), 0.1)
    assert solve(operator, b, 1.5, iterations=9, tolerance=1e-5).residual < 1e-5
    assert lissa(operator, 0 * b, 1.5, scale=4.0, depth=9).residuals == (0.0,)


def test_influence_is_what_training_with_less_of_the_record_does() -> None:
    network, query, less = tiny(), torch.tensor([5, 9, 3, 7]), 0.05
    some = [*samples(), query[:3], query.flip(0)]  # some alike
    start = embedding(network).detach().clone()
    count = sum(len(tokens) - 1 for tokens in some)

    def trained(weight: Tensor, weights: list[float]) -> Tensor:
        """The minimum of the mean loss and λ/2 · the squared distance from the start."""
        weight = weight.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            fits = [summed(network, tokens, weight) for tokens in some]
            fit = sum(w * each for w, each in zip(weights, fits, strict=True))
            loss = fit / count + DAMPING / 2 * (weight - start).square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        return weight.detach()

    best = trained(start, [1.0] * len(some))
    embedding(network).data.copy_(best)
    q = fresh(network, [query]).detach()
    solved = solve(Hessian(network, some), q, DAMPING, iterations=200, tolerance=1e-8)
    before, shape = summed(network, query, best).item(), (VOCABULARY, WIDTH)
    for record in (3, 4):
        weights = [1.0 - less * (at == record) for at in range(len(some))]
        found = summed(network, query, trained(best, weights)).item() - before
        dense = fresh(network, [some[record]]).detach()
        gradient = FactoredGradient([Term.one_hot(torch.arange(VOCABULARY), dense)], shape)
        assert gradient.along(solved.x) / count == pytest.approx(found / less, rel=0.1)


def captured(store: Store) -> tuple[nn.Module, dict[str, Tensor], Query]:
    """A small network, what a store captured of one step on it, and a query at the network then."""
    network = models.tiny(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1).eval()
    assert sum(weight.numel() for weight in network.parameters()) <= 2000
    tokens = {f"s-{at}": each for at, each in enumerate(samples(6))}
    optimizer = models.sgd(network)
    with gradstore.capture(network, store, optimizer, sides="both", top_k=VOCABULARY - 1):
        network(**models.batch_of(tokens)).loss.backward()
        optimizer.step()
    query = Query("asked", {None: gradient_of(network, torch.tensor([5, 9, 3, 7]))})
    return network, tokens, query


def test_a_query_is_solved_in_the_curvature_of_the_runs_records(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tokens, query = captured(store)
    q = query.gradients[None].dense().double().flatten()
    dense = dense_gauss_newton(network.double(), list(tokens.values()))
    damping = float(0.1 * (q @ dense @ q) / (q @ q))
    expected = torch.linalg.solve(dense + damping * torch.eye(len(q), dtype=q.dtype), q)

    rough = by_products(store, store.run(), query, network.float())
    assert rough.bent is not None
    monkeypatch.setattr("gradstore.influence.solved.ITERATIONS", 500)
    monkeypatch.setattr("gradstore.influence.solved.TOLERANCE", 1e-6)
    found = by_products(store, store.run(), query, network)
    assert found.bent is not None
    assert found.bent.damping == pytest.approx(damping, rel=1e-4)
    assert models.relative(found.gradients[None].dense().double().flatten(), expected) < 1e-3
    assert found.bent.residual <= 1e-6 < rough.bent.residual <= 0.05
    assert (found.name, found.replaced, rough.replaced) == ("asked", "hvp", "hvp")

    x = rough.gradients[None].dense().double().flatten()
    missing = dense @ x + damping * x - q
    assert float(missing.norm() / q.norm()) == pytest.approx(rough.bent.residual, rel=1e-2)


def test_a_query_is_solved_in_the_fisher_matrix_of_stored_gradients(store: Store) -> None:
    _, _, query = captured(store)
    stored = store.records(range(1, 7), store.run()["run_id"])
    G = torch.stack([r.gradient(store.model).dense().double().flatten() for r in stored])
    q = query.gradients[None].dense().double().flatten()
    found = by_fisher(store, store.run(), query)
    strength = len(G) ** 2 / float(G.square().sum())  # plain gradient descent: the scale is 1
    matrix = torch.eye(len(q), dtype=q.dtype) + strength * G.T @ G / len(G)
    assert len(G) == 6
    assert found.bent is not None
    assert found.bent.damping == pytest.approx(strength, rel=1e-4)
    expected = torch.linalg.solve(matrix, q)
    assert models.relative(found.gradients[None].dense().double().flatten(), expected) < 1e-3
    assert (found.replaced, found.bent.residual, found.bent.records) == ("newton", 0.0, 6)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_a_query_is_solved_and_scored_over_captured_layers_too(
    store: Store, monkeypatch: pytest.MonkeyPatch, curvature: Any
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "max_position_embeddings": 8}
    network = models.tiny(vocab_size=VOCABULARY, **sizes).eval()
    tokens = {f"s-{at}": each for at, each in enumerate(samples(4))}
    optimizer = models.sgd(network)
    how: dict[str, Any] = {"sides": "both", "top_k": VOCABULARY - 1, "layers": "blocks"}
    with gradstore.capture(network, store, optimizer, **how):
        network(**models.batch_of(tokens)).loss.backward()
        optimizer.step()
    layers = store.layers(1)
    assert len(layers) > 3
    asked = torch.tensor([5, 9, 3, 7])
    gradients = gradients_of(network, asked, 1, layers)
    embedded = gradient_of(network, asked)
    query = Query("asked", {None: embedded}, layers=tuple(layers), beside=gradients)
    names = {"embedding": embedded.dense(), **gradients}
    q = flat(names).double()
    dense = dense_over(Hessian if curvature == "hessian" else GaussNewton, network.double(),
                       list(tokens.values()), list(names))  # fmt: skip
    damping = DAMPING - min(0.0, float(torch.linalg.eigvalsh(dense)[0]))
    expected = torch.linalg.solve(dense + damping * torch.eye(len(q), dtype=q.dtype), q)

    monkeypatch.setattr("gradstore.influence.solved.ITERATIONS", 500)
    monkeypatch.setattr("gradstore.influence.solved.TOLERANCE", 1e-6)
    solved = by_products(
        store, store.run(), query, network.float(), curvature=curvature, damping=damping
    )
    x = flat({"embedding": solved.gradients[None].dense(), **solved.beside}).double()
    assert models.relative(x, expected) < 1e-4

    [found] = influences(store, [solved], Settings("hvp", precision="float32"))
    for sample, score in zip(found.sample_ids, found.values, strict=True):
        [record] = store.records([sample], 1)
        own = record.gradients(store.model, ["embedding", *(of.layer for of in layers)])
        e, g = record.exposure, flat({name: of.dense() for name, of in own.items()}).double()
        wanted = float(g @ expected) * e.learning_rate * e.batch_share * e.grad_scale
        scale = float(g.norm() * expected.norm()) * e.learning_rate * e.batch_share
        assert abs(score - wanted) < 1e-4 * scale
    with pytest.raises(SettingsError, match="leave --layers out"):
        tokens_of(store, found, found.sample_ids)
    with pytest.raises(SettingsError, match="--layers belong to --method hvp"):
        influences(store, [query], Settings())


@pytest.mark.parametrize(("curvature", "solver"), [("hessian", "cg"), ("hessian", "lissa"),
                                                   ("gauss-newton", "lissa")])  # fmt: skip
def test_a_query_is_solved_by_other_ways_alike(
    store: Store, monkeypatch: pytest.MonkeyPatch, curvature: Any, solver: Any
) -> None:
    network, tokens, query = captured(store)
    monkeypatch.setattr("gradstore.influence.solved.ITERATIONS", 500)
    monkeypatch.setattr("gradstore.influence.solved.DEPTH", 500)
    monkeypatch.setattr("gradstore.influence.solved.TOLERANCE", 1e-6)
    of = dense_hessian if curvature == "hessian" else dense_gauss_newton
    dense = of(network.double(), list(tokens.values()))
    damping = DAMPING - min(0.0, float(torch.linalg.eigvalsh(dense)[0]))
    network.float()
    found = by_products(
        store, store.run(), query, network, curvature=curvature, solver=solver, damping=damping
    )
    q = query.gradients[None].dense().double().flatten()
    expected = torch.linalg.solve(dense + damping * torch.eye(len(q), dtype=q.dtype), q)
    assert models.relative(found.gradients[None].dense().double().flatten(), expected) < 1e-4
    assert found.bent is not None
    assert (found.bent.curvature, found.bent.solver) == (curvature, solver)
    assert (found.bent.damping, found.bent.records) == (damping, 6)
    assert found.bent.residual <= 1e-6
    assert found.bent.iterations > 1
    if curvature == "hessian":
        with pytest.raises(InfluenceError, match=r"with λ 1e-06, .*: damp it more.* \(--damping"):
            by_products(
                store, store.run(), query, network, curvature=curvature, solver=solver,
                damping=1e-6,
            )  # fmt: skip


def test_what_curvature_cannot_be_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, query = captured(store)
    stale = replace(query, gradients={1: query.gradients[None]})
    with pytest.raises(InfluenceError, match="must the query's gradient be: name it with --model"):
        by_fisher(store, store.run(), stale)
    flat = replace(query, gradients={None: query.gradients[None] * 0.0})
    with pytest.raises(InfluenceError, match="its loss is at its least"):
        by_products(store, store.run(), flat, network)

    def none(*_: object) -> None:
        raise RuntimeError("no forward AD rule")

    monkeypatch.setattr(predictions, "jvp", none)
    with pytest.raises(InfluenceError, match=r"\(no forward AD rule\); give --method newton"):
        by_products(store, store.run(), query, network)
