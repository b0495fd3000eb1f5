"""
Data distillation: ten images in place of a thousand
====================================================

A classifier is trained on ten images, one for each digit. Which ten images make it read a thousand real ones best [1]_?
Its weights are the solution of a training problem, the pixels of the ten images are the parameters of that problem, and
the loss on the real images is the outer loss:

    min over θ of L(y*(θ)),   y*(θ) = argmin over y of ℓ(y; θ) + μ/2 ‖y‖².
"""

import autograd.numpy as anp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import implicitdiff as idf

# %%
# The images have 8 × 8 pixels between 0 and 1. Half of them serve the outer loss, the other half is looked at only at
# the end. The classifier is a softmax regression.
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.data))
pixels, labels = digits.data[order] / 16, digits.target[order]
half = len(labels) // 2
seen, unseen = (
    (pixels[:half], np.eye(10)[labels[:half]]),
    (pixels[half:], np.eye(10)[labels[half:]]),
)


def cross_entropy(y, x, one_hot):
    scores = anp.dot(x, y["W"]) + y["b"]
    scores = scores - anp.mean(scores, axis=1, keepdims=True)
    return anp.mean(
        anp.log(anp.sum(anp.exp(scores), axis=1)) - anp.sum(scores * one_hot, axis=1)
    )


def accuracy(y, x, one_hot):
    return np.mean(np.argmax(x @ y["W"] + y["b"], axis=1) == np.argmax(one_hot, axis=1))


# %%
# Training on the ten images, with a little weight decay, is strictly convex. The ten labels are 0, 1, …, 9.


def training(y, images):
    decay = anp.sum(y["W"] ** 2) + anp.sum(y["b"] ** 2)
    return cross_entropy(y, images, np.eye(10)) + 0.01 * decay / 2


def on_real_images(y, images):
    return cross_entropy(y, *seen)


# %%
# It starts from plain grey. Adam moves the 640 pixels along the gradient; ``bilevel`` keeps weights and adjoint where
# they were, and corrects them until the estimated error of the gradient is below a tenth.
start = np.full((10, 64), 0.5)
zero = {"W": np.zeros((64, 10)), "b": np.zeros(10)}
found = idf.bilevel(
    training,
    on_real_images,
    zero,
    start,
    steps=60,
    learning_rate=0.05,
    bounds=(0.0, 1.0),
)
print(found)

# %%
# What a classifier reads of the images that nobody has shown it, trained on the ten learned images, on ten real ones
# (the first of each digit), and on all real images of the first half.


def trained(x, one_hot):
    def objective(y, _):
        decay = anp.sum(y["W"] ** 2) + anp.sum(y["b"] ** 2)
        return cross_entropy(y, x, one_hot) + 0.01 * decay / 2

    fit = idf.bilevel(
        objective,
        on_real_images,
        zero,
        np.zeros(1),
        steps=1,
        tolerance=idf.Fixed(1e-6),
    )
    return fit.y


first = [np.flatnonzero(labels[:half] == digit)[0] for digit in range(10)]
scores = {
    "ten learned": accuracy(trained(found.theta, np.eye(10)), *unseen),
    "ten real": accuracy(trained(seen[0][first], np.eye(10)), *unseen),
    f"all {half}": accuracy(trained(*seen), *unseen),
}
for name, score in scores.items():
    print(f"trained on {name}: {score:.1%} of the unseen images are read")

# %%
# Check of the gradient at the learned images: central differences of the loss after training anew, along one direction.
y = trained(found.theta, np.eye(10))
gradient = idf.implicit_grad(training, on_real_images, y, found.theta)
direction = np.random.default_rng(2).normal(size=start.shape)


def along(step):
    return on_real_images(trained(found.theta + step * direction, np.eye(10)), None)


difference = (along(1e-3) - along(-1e-3)) / 2e-3
print(
    f"slope by implicitdiff {np.sum(gradient * direction):.6f}, by differences {difference:.6f}"
)

# %%
fig = plt.figure(figsize=(10, 4.6), layout="constrained")
top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1.5))
for digit, axes in enumerate(top.subplots(1, 10)):
    axes.imshow(found.theta[digit].reshape(8, 8), cmap="gray_r", vmin=0.2, vmax=0.8)
    axes.set(title=str(digit), xticks=[], yticks=[])
left, right = bottom.subplots(1, 2)
left.plot([row.step for row in found.history], [row.value for row in found.history])
left.set(xlabel="outer step", ylabel="loss on real images")
bars = right.barh(
    list(scores), [100 * score for score in scores.values()], color=["C0", "C7", "C2"]
)
right.bar_label(bars, fmt="%.0f %%", padding=3)
right.set(xlim=(0, 112), xlabel="unseen images read, %")
right.invert_yaxis()
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)

# %%
# References
# ----------
# .. [1] T. Wang, J.-Y. Zhu, A. Torralba, A. A. Efros, "Dataset distillation", 2018.
#    `arXiv:1811.10959 <https://arxiv.org/abs/1811.10959>`_
