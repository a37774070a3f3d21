import pytest
import torch
from torch import nn

from certifiers.attack import attack, pgd
from certifiers.errors import InputError
from certifiers.fingerprint import model_hash
from certifiers.threat import L2Ball, LinfBall
from tests.nets import NETS, images


def linear(weight: list[list[float]], bias: list[float]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
        layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return layer.eval()


# At the grey point (0.5, 0.5, 0.5) the logits are 0.3, 0 and -20. Label 0 is ahead of class 1 by 0.3, with the
# weight difference (1, -2, 2), and so far ahead of class 2 that it does not matter.
MODEL = linear([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0], [1.0, -2.5, 2.0]], [-0.2, 0.0, -20.25])
GREY = torch.full((1, 3), 0.5, dtype=torch.float64)
LABEL = torch.tensor([0])
RADII = [(LinfBall, 0.3 / 5.0), (L2Ball, 0.3 / 3.0)]  # margin / |w|_1, margin / |w|_2


@pytest.mark.parametrize("ball, radius", RADII)
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_linear_model_breaks_at_its_radius_and_not_below(ball, radius, loss):
    def prediction(eps: float) -> int:
        return int(MODEL(pgd(MODEL, GREY, LABEL, ball(eps), loss=loss)).argmax())

    assert torch.allclose(MODEL(GREY), torch.tensor([[0.3, 0.0, -20.0]], dtype=torch.float64))
    assert prediction(radius * (1 - 1e-6)) == 0
    assert prediction(radius * (1 + 1e-6)) == 1


@pytest.mark.parametrize("ball, radius", RADII)
def test_attack_succeeds_exactly_where_it_can(ball, radius):
    assert not attack(MODEL, GREY, LABEL, ball(radius * (1 - 1e-6)))[1]
    x_adv, success = attack(MODEL, GREY, LABEL, ball(radius * (1 + 1e-6)))
    assert success and ball(radius * (1 + 1e-6)).contains(GREY, x_adv, tolerance=1e-12)


def test_the_pixel_range_limits_the_attack():
    # Pixel 0 is black and would have to get darker; without it, |w|_1 = 4 is left.
    x = torch.tensor([[0.0, 0.25, 0.5]], dtype=torch.float64)
    assert torch.allclose(MODEL(x), torch.tensor([[0.3, 0.0, -19.875]], dtype=torch.float64))
    assert not attack(MODEL, x, LABEL, LinfBall(0.3 / 4.0 - 1e-6))[1]
    assert attack(MODEL, x, LABEL, LinfBall(0.3 / 4.0 + 1e-6))[1]


@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.8)])
@pytest.mark.parametrize("name", NETS)
def test_results_stay_inside_and_are_no_worse_than_clean(name, ball):
    model, (x, _) = NETS[name](), images(12)
    x[:4] = x[:4].round()
    y = model(x).argmax(1)

    def excess(z: torch.Tensor) -> torch.Tensor:
        return z.scatter(1, y[:, None], -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]

    x_adv, success = attack(model, x, y, ball, steps=10, restarts=3)
    assert ball.contains(x, x_adv, tolerance=1e-7).all()
    assert torch.equal(success, model(x_adv).argmax(1) != y)
    assert (excess(model(x_adv)) > excess(model(x))).all()
    assert success.any()  # untrained nets are weak: an attack that finds nothing here is broken


def test_random_restarts_reach_what_the_clean_gradient_does_not():
    class Flat(nn.Module):
        def forward(self, x):  # no gradient up to 0.55; from 0.57 on class 1 wins
            return torch.cat([torch.full_like(x, 0.02), torch.relu(x - 0.55)], 1)

    x, y = torch.tensor([[0.5]]), LABEL
    assert not attack(Flat(), x, y, LinfBall(0.1), restarts=1)[1]
    assert attack(Flat(), x, y, LinfBall(0.1), restarts=12)[1]
    assert attack(Flat(), x, y, L2Ball(0.1), restarts=12)[1]


def test_what_is_wrong_already_is_left_alone():
    x, y = torch.cat([GREY, GREY]), torch.tensor([1, 0])
    x_adv, success = attack(MODEL, x, y, LinfBall(0.01))
    assert torch.equal(x_adv[0], x[0]) and success.tolist() == [True, False]


def test_broken_inputs_are_not_run_again():
    class Counting(nn.Module):
        rows = 0

        def forward(self, x):
            self.rows += len(x)
            return MODEL(x)

    model = Counting()
    pgd(model, GREY.repeat(7, 1), LABEL.repeat(7), LinfBall(0.5), steps=20, restarts=5)
    assert model.rows < 7 * 8  # of 7 * 100: the margin is gone after few steps


@pytest.mark.parametrize("ball", [LinfBall(0.03), L2Ball(0.3)])
def test_neither_model_nor_global_random_numbers_change(ball):
    model, (x, y) = NETS["bn"](), images(6)
    model[0].weight.requires_grad_(False)
    before = model_hash(model), torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    pgd(model, x, y, ball, steps=4, restarts=2)
    attack(model, x, y, ball, steps=4)
    assert model_hash(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert [p.requires_grad for p in model.parameters()] == before[2]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert x.grad is None and not x.requires_grad


@pytest.mark.parametrize("ball", [LinfBall(0.02), L2Ball(0.2)])
def test_seed_and_number_alone_choose_the_random_starts(ball):
    model, (x, _) = NETS["conv"](dtype=torch.float64), images(6, dtype=torch.float64)
    y = model(x).argmax(1)

    def run(rows: list[int], **options) -> torch.Tensor:
        return attack(model, x[rows], y[rows], ball, steps=0, restarts=8, **options)[0]

    torch.manual_seed(1)
    whole = run([0, 1, 2, 3, 4, 5], indices=[0, 1, 2, 3, 4, 5])
    torch.manual_seed(2)
    assert torch.equal(whole, run([0, 1, 2, 3, 4, 5]))
    assert torch.allclose(whole[[4, 1]], run([4, 1], indices=[4, 1]), atol=1e-12)
    assert not torch.allclose(whole[[4, 1]], run([4, 1], indices=[40, 41]), atol=1e-4)
    assert not torch.allclose(whole, run([0, 1, 2, 3, 4, 5], seed=1), atol=1e-4)


def test_works_without_gradients_enabled():
    with torch.no_grad():
        assert attack(MODEL, GREY, LABEL, LinfBall(0.1))[1]


def test_infinite_logits_are_no_success():
    class Overflow(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum(1), x.sum(1) * torch.inf], 1)

    assert not attack(Overflow(), GREY, LABEL, LinfBall(0.1))[1]


def test_no_inputs():
    x_adv, success = attack(MODEL, GREY[:0], LABEL[:0], LinfBall(0.1))
    assert x_adv.shape == (0, 3) and success.shape == (0,)


def test_bad_settings():
    with pytest.raises(InputError, match="margin, ce.*'hinge'"):
        pgd(MODEL, GREY, LABEL, LinfBall(0.1), loss="hinge")
    with pytest.raises(InputError, match="-1 steps"):
        pgd(MODEL, GREY, LABEL, LinfBall(0.1), steps=-1)
    with pytest.raises(InputError, match="0 restarts"):
        attack(MODEL, GREY, LABEL, LinfBall(0.1), restarts=0)
