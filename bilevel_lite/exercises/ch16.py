"""Checks of chapter 16, unlearnable examples."""

import math

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers


@exercise("16.A")
def check_sizes(answer):
    """2,500 images of 3 x 32 x 32, a batch of 250."""
    whole, batch = numbers(answer, 2)
    near(
        whole, 2500 * 3072, "The numbers in lam",
        [(2500 * 1024, "each pixel has three colours."), (3072, "that is one image."),
         (2500, "lam has a number for each pixel, not for each image.")],
        "Images times colours times rows times columns.", 1e-3,
    )  # fmt: skip
    near(
        batch, 250 * 3072, "The numbers that can be other than zero",
        [(2500 * 3072, "lam_i stands in the loss of image i alone: J's other rows are zero."),
         (250, "each of the batch's images has 3,072 of them."), (250 * 1024, "three colours.")],
        "The rows of the batch's images.", 1e-3,
    )  # fmt: skip


@exercise("16.B")
def check_visits(answer):
    """A fifth of the radius a visit; ten batches a pass."""
    visits, steps = numbers(answer, 2)
    near(
        visits, 5, "The visits",
        [(10, "it starts at 0, in the middle of the box."),
         (1, "one visit is one step of 0.2 radii.")],
        "Steps of 0.2 from 0 to 1.", 1e-3,
    )  # fmt: skip
    near(
        steps, 50, "The outer steps",
        [(5, "an outer step visits one batch of 250; there are ten of them."),
         (41, "that is the first batch; the last one waits for the end of the fifth pass."),
         (10, "that is one pass."), (1250, "an outer step visits 250 images at once.")],
        "Visits times batches in a pass.", 1e-3,
    )  # fmt: skip


def _logits(generator, n, C):
    """Logits of some size and labels that are now the least and now the most likely."""
    z = 2 * draw(generator, n, C)
    y = torch.randint(C, (n,), generator=generator)
    y[0], y[1] = z[0].argmin(), z[1].argmax()
    return z, y


@exercise("16.1")
def check_worst(worst_wrong):
    """By a loop over the wrong labels."""
    generator = torch.Generator().manual_seed(161)
    for n, C in ((6, 4), (9, 3)):
        z, y = _logits(generator, n, C)
        each = torch.stack([-z.log_softmax(1)[:, c] for c in range(C)], 1)
        wrong = torch.where(F.one_hot(y, C).bool(), -math.inf, each).amax(1)
        best = torch.where(F.one_hot(y, C).bool(), math.inf, each).amin(1)
        others = (each.sum(1) - each[torch.arange(n), y]) / (C - 1)
        compare(
            worst_wrong(z.clone(), y.clone()), wrong.mean(),
            [("The label itself is among those that you take the maximum over.",
              each.amax(1).mean()),
             ("That is the loss of the likeliest wrong label: the maximum of the loss is the "
              "*least* likely one.", best.mean()),
             ("That is the mean over the wrong labels, not their maximum.", others.mean()),
             ("That is the cross-entropy of the label itself.",
              each[torch.arange(n), y].mean()),
             ("That is minus the cross-entropy of the label.",
              -each[torch.arange(n), y].mean()),
             ("Take the mean over the images, not the sum.", wrong.sum()),
             ("The normaliser logsumexp is over all C labels, the true one among them.",
              (wrong - each.new_tensor([[float(z[i].logsumexp(0)) for i in range(n)]]).squeeze(0)
               + torch.where(F.one_hot(y, C).bool(), -math.inf, z).logsumexp(1)).mean()),
             ("The sign is turned.", -wrong.mean())],
            f"With {n} images and {C} labels f", 1e-9,
        )  # fmt: skip
    one = worst_wrong(torch.tensor([[0.0, -900.0, 5.0]]).double(), torch.tensor([2]))
    if not math.isclose(float(one), 905.0067, rel_tol=1e-5):
        raise Wrong("With the logits (0, -900, 5) and label 2 it is 905.007: a probability that "
                    "underflows has no logarithm; stay with logits.")  # fmt: skip


@exercise("16.2")
def check_slope(slope):
    """By automatic differentiation of the loop."""
    generator = torch.Generator().manual_seed(162)
    for n, C in ((5, 4), (7, 3)):
        z, y = _logits(generator, n, C)
        at = z.clone().requires_grad_()
        each = -at.log_softmax(1)
        wrong = torch.where(F.one_hot(y, C).bool(), -math.inf, each).amax(1).mean()
        (truth,) = torch.autograd.grad(wrong, at)
        prob = z.softmax(1)
        masked = torch.where(F.one_hot(y, C).bool(), math.inf, z)
        least = F.one_hot(masked.argmin(1), C)
        likely = F.one_hot(torch.where(F.one_hot(y, C).bool(), -math.inf, z).argmax(1), C)
        compare(
            slope(z.clone(), y.clone()), truth,
            [("f is a mean: divide by n.", truth * n),
             ("The one in the slope stands at the least likely wrong label, not at y.",
              (prob - F.one_hot(y, C)) / n),
             ("The wrong label with the largest loss is the one with the smallest logit.",
              (prob - likely) / n),
             ("The label itself can be the least likely one: it must be left out.",
              (prob - F.one_hot(z.argmin(1), C)) / n),
             ("The normaliser has a slope too: the probabilities.", -least / n),
             ("The sign is turned.", -truth)],
            f"With {n} images and {C} labels the slope", 1e-9,
        )  # fmt: skip


@exercise("16.3")
def check_sign_step(sign_step):
    """Pixel by pixel."""
    generator = torch.Generator().manual_seed(163)
    for n, r, step in ((30, 0.1, 0.4), (40, 0.2, 0.3)):
        x = torch.rand(n, 3, generator=generator, dtype=torch.float64)
        x[:6] = x[:6].round()  # black and white pixels
        lam = 2 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 1
        lam = torch.maximum(torch.minimum(lam, (1 - x) / r), -x / r)
        slope = draw(generator, n, 3)
        slope[3] = 0

        def limited(new, x=x, r=r):
            return torch.maximum(torch.minimum(new.clamp(-1, 1), (1 - x) / r), -x / r)

        truth = limited(lam - step * slope.sign())
        got = sign_step(*(part.clone() for part in (x, lam, slope)), r, step)
        compare(
            got, truth,
            [("We minimise: against the slope.", limited(lam + step * slope.sign())),
             ("Where the slope is zero its sign is zero: the pixel stays.",
              limited(lam - step * torch.where(slope > 0, 1.0, -1.0).to(lam))),
             ("The step is the sign of the slope, of the same size in every pixel.",
              limited(lam - step * slope)),
             ("Pixels leave their range: x + r lam must stay in [0, 1].",
              (lam - step * slope.sign()).clamp(-1, 1)),
             ("lam is in units of the radius: it is bounded by 1, not by r.",
              torch.maximum(torch.minimum((lam - step * slope.sign()).clamp(-r, r), (1 - x) / r),
                            -x / r)),
             ("lam leaves the radius: |lam| <= 1.",
              torch.maximum(torch.minimum(lam - step * slope.sign(), (1 - x) / r), -x / r)),
             ("The step is one of lam, which is in units of r already.",
              limited(lam - r * step * slope.sign())),
             ("Return lam, not the images.", x + r * truth),
             ("The result is not projected: step first, then project.",
              lam - step * slope.sign())],
            f"With r = {r} the new lam", 1e-9,
        )  # fmt: skip


@exercise("16.4")
def check_envelope(envelope):
    """By finite differences of the solved problem."""
    generator = torch.Generator().manual_seed(164)
    for k in range(3):
        a, l2, lam, e = (
            torch.rand(4, generator=generator, dtype=torch.float64) + 0.4 + 0.1 * k
        ).tolist()

        def g(lam, theta, a=a, l2=l2):
            return a / 2 * (theta - lam) ** 2 + l2 * theta**2

        def star(lam, a=a, l2=l2):
            return a * lam / (a + 2 * l2)

        eps = 1e-5
        slope = (g(lam + eps, star(lam + eps)) - g(lam - eps, star(lam - eps))) / (2 * eps)
        off = (g(lam + eps, star(lam) + e) - g(lam - eps, star(lam) + e)) / (2 * eps)
        got = numbers(envelope(a, l2, lam, e), 3)
        near(
            got[0], star(lam), "theta*",
            [(lam, "the penalty draws theta towards 0."),
             (a * lam / (a + l2), "the slope of l2 theta^2 is 2 l2 theta."),
             (2 * l2 * lam / (a + 2 * l2), "a and 2 l2 have changed places.")],
            "Set the slope of g in theta to zero.", 1e-6,
        )  # fmt: skip
        near(
            got[1], slope, "dPhi/dlam",
            [(a * lam - slope, "that is what reaches lam through theta, with the sign turned."),
             (0.0, "theta* is not lam: something is left."),
             (-slope, "the sign is turned: g grows with |lam|."),
             (a * lam, "theta answers: it is the gradient at theta*, not at 0.")],
            "Put theta* into the gradient in lam.", 1e-6,
        )  # fmt: skip
        near(
            got[2], off - slope, "The error",
            [(slope - off, "the gradient there less the truth, not the truth less it."),
             (off, "that is the gradient there: subtract the truth."),
             (-a / 2 * e**2, "the *value* g is wrong by e^2; its gradient in lam by e."),
             (-e, "the curvature a stands before it."), (0.0, "away from theta* it is not zero.")],
            "The gradient in lam at theta* + e, less that at theta*.", 1e-6,
        )  # fmt: skip


@exercise("16.5")
def check_published(published):
    """Image by image."""
    generator = torch.Generator().manual_seed(165)
    for n, r, C in ((12, 8 / 255, 4), (9, 25 / 255, 10)):
        x = torch.randint(256, (n, 6), generator=generator).double() / 255
        x[0, :3], x[1, :3] = 0.0, 1.0
        lam = 2 * torch.rand(n, 6, generator=generator, dtype=torch.float64) - 1
        y = torch.randint(C, (n,), generator=generator)
        order = torch.randperm(n, generator=generator)
        while bool((order == torch.arange(n)).any()):
            order = torch.randperm(n, generator=generator)
        got = published(*(part.clone() for part in (x, y, lam)), r, order.clone())
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("Return two things: images and labels.")

        def bits(images):
            return (255 * images).round() / 255

        truth = bits((x + r * lam).clamp(0, 1))[order]
        compare(
            got[0], truth,
            [("Return pixels from 0 to 1: divide by 255.", 255 * truth),
             ("Each image has the noise of another: noise goes where its image goes.",
              bits((x[order] + r * lam).clamp(0, 1))),
             ("The noise is lam times the radius.", bits((x + lam).clamp(0, 1))[order]),
             ("Eight bits: round to the nearest; cutting off makes every image darker.",
              ((255 * (x + r * lam).clamp(0, 1)).floor() / 255)[order]),
             ("Pixels are out of range: clamp to [0, 1].", bits(x + r * lam)[order]),
             ("The images are not in the given order.", bits((x + r * lam).clamp(0, 1))),
             ("Published images have 8 bits a pixel: round.", (x + r * lam).clamp(0, 1)[order]),
             ("Cutting off makes every image darker, and each has the noise of another: round, "
              "and let noise go where its image goes.",
              (255 * (x[order] + r * lam).clamp(0, 1)).floor() / 255),
             ("There is no noise in it.", x[order])],
            "The published pixels", 1e-9,
        )  # fmt: skip
        compare(
            torch.as_tensor(got[1]).double(), y[order].double(),
            [("Images were shuffled, labels were not.", y.double()),
             ("A label goes where its image goes: index with the order.",
              y[order.argsort()].double())],
            "The labels", 1e-9,
        )  # fmt: skip
