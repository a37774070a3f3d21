"""Where a linear bound is least there is often a counterexample: the methods offer that input, and it is tested."""

from __future__ import annotations

import pytest
import torch

from certifiers import L2Ball, LinfBall, certify
from certifiers.bounds import Region
from certifiers.bounds.margins import bounded, least_margin_inputs, margins_of
from certifiers.methods import METHODS
from certifiers.verdict import Status

from .linear_nets import dual_norm, inner_images, linear, margins
from .random_nets import CLASSES, SHAPE, random_net


@pytest.mark.parametrize("kind", [LinfBall, L2Ball])
@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
def test_of_a_linear_network_it_is_the_worst_input(kind, method):
    """The margin of a linear network falls by eps times the dual norm: just beyond that, each input is broken."""
    model = linear()
    x, _ = inner_images()
    y = model(x).argmax(1)
    exact = margins(model, x, y) / dual_norm(model, kind.norm)
    for place in range(len(x)):
        for factor, status in ((0.99, Status.certified), (1.01, Status.falsified)):
            threat = kind(float(exact[place].detach() * factor))
            if float(threat.eps) > 0.35:  # the pixel range would bind
                continue
            (verdict,) = certify(model, x[[place]], y[[place]], threat, method, attack_steps=0)
            assert (verdict.status, verdict.method) == (status, method)


@pytest.mark.parametrize("threat", [LinfBall(0.1), L2Ball(0.7)], ids=lambda threat: threat.norm)
@pytest.mark.parametrize("seed", range(6))
def test_the_linear_bound_is_least_there(seed, threat):
    """No input of the region has a smaller value of the row, and all suspects lie in the threat set."""
    torch.manual_seed(seed)
    net, x, y = random_net(seed), torch.rand(3, *SHAPE), torch.randint(CLASSES, (3,))
    network, intervals = bounded(net, x, threat, "crown")
    bounds = margins_of("crown", network, intervals, y)
    points, samples, wrong = least_margin_inputs(network, intervals, y, torch.ones(3, CLASSES, dtype=torch.bool))
    assert len(points) == 3 * (CLASSES - 1)
    assert threat.select(samples).contains(x[samples], points).all()
    logits = net(points).double()
    value = logits.gather(1, y[samples, None])[:, 0] - logits.gather(1, wrong[:, None])[:, 0]
    assert (value >= bounds[samples, wrong] - 1e-4).all()


def test_the_minimiser_by_hand():
    x = torch.tensor([[0.5, 0.1]])
    rows = torch.tensor([[[1.0, 2.0], [-3.0, 0.0], [3.0, 4.0]]])
    box = Region.of(x, LinfBall(0.2)).minimiser(rows)[0]
    torch.testing.assert_close(box, torch.tensor([[0.3, 0.0], [0.7, 0.15], [0.3, 0.0]]))
    ball = Region.of(x, L2Ball(0.1)).minimiser(rows)[0]
    length = 5**0.5
    expected = [[0.5 - 0.1 / length, 0.1 - 0.2 / length], [0.6, 0.1], [0.5 - 0.06, 0.1 - 0.08]]
    torch.testing.assert_close(ball, torch.tensor(expected))


def test_only_inputs_with_an_open_margin_get_one():
    torch.manual_seed(0)
    net, x = random_net(4), torch.rand(6, *SHAPE)
    y = net(x).argmax(1)
    classes = torch.ones(6, CLASSES, dtype=torch.bool).scatter(1, y[:, None], False)
    found = METHODS["crown"](net, x, y, LinfBall(0.01), classes, None)
    open_ = (classes & ~(found.bounds > 0)).any(1)
    assert 0 < int(open_.sum()) < 6
    offered = found.inputs.flatten(1).isfinite().all(1)
    assert offered.tolist() == open_.tolist()
