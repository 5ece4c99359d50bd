"""Against scipy, which is no dependency: what scipy 1.17 found is written down here.

`python tests/evals/test_against_scipy.py`, where scipy is installed, computes it again and prints it. The features are of numpy's `RandomState`,
whose numbers never change.
"""

import json

import numpy as np
import pytest
import torch

from dite_evals.fid import estimate_fid, extrapolate, size_curve
from dite_evals.frechet import Reference, frechet_distance, moments
from dite_evals.intervals import student, wilson
from dite_evals.kernel import cmmd, mmd2
from dite_evals.manifold import precision_recall
from dite_evals.score import inception_score

SCIPY = {
    "fid": 11.755417308882215,
    "fid of few": 31.483813980239418,
    "fid infinity": 9.794726250082125,
    "kid": 21.364850980475353,
    "cmmd": 0.2230842130281907,
    "precision, recall": [0.8862559241706162, 0.739413680781759],
    "inception score": 4.317377604580949,
    "student": {
        "0.9": [6.3137515147, 2.9199855804, 2.3533634348, 2.1318467863, 1.8945786051, 1.7291328115, 1.660391156],
        "0.95": [12.706204736, 4.3026527297, 3.1824463053, 2.7764451052, 2.3646242516, 2.0930240544, 1.9842169516],
        "0.999": [636.61924877, 31.599054576, 12.923978637, 8.6103015814, 5.4078825209, 3.8834058526, 3.3915288334],
    },
    "wilson": [
        [0, 5, 0.0, 0.35111650076510126],
        [3, 7, 0.18644319036395607, 0.7105229089864071],
        [500, 500, 0.9946180353701581, 1.0],
        [41, 1000, 0.031864194034164045, 0.05261279325993612],
    ],
}
DEGREES = (1, 2, 3, 4, 7, 19, 99)


def features():
    """[211, 12] and [307, 12], of two Gaussians with correlated features."""
    draw = np.random.RandomState(7)
    mixing = draw.randn(12, 12)
    return draw.randn(211, 12) @ mixing + 0.3, draw.randn(307, 12) @ (mixing + 0.3 * draw.randn(12, 12))


def few():
    """[9, 24] and [80, 24]: fewer vectors than features on one side."""
    draw = np.random.RandomState(8)
    return draw.randn(9, 24), 1.2 * draw.randn(80, 24)


def of(x):
    return moments(torch.from_numpy(x))


@pytest.mark.parametrize(("name", "arrays"), [("fid", features), ("fid of few", few)])
def test_the_frechet_distance_is_scipy_s(name, arrays):
    x, y = arrays()
    assert frechet_distance(of(x), of(y)) == pytest.approx(SCIPY[name], rel=1e-6)


def test_the_estimate_is_of_the_same_distance():
    x, y = features()
    assert estimate_fid(x, of(y)).value == pytest.approx(SCIPY["fid"], rel=1e-6)


def test_the_line_through_fid_is_scipy_s_regression():
    x, y = features()
    assert extrapolate(size_curve(torch.from_numpy(x), Reference(of(y)))) == pytest.approx(SCIPY["fid infinity"], rel=1e-6)


def test_the_polynomial_kernel_distance_is_scipy_s():
    assert mmd2(*features()) == pytest.approx(SCIPY["kid"], rel=1e-9)


def test_cmmd_is_scipy_s():
    assert cmmd(*features()).value == pytest.approx(SCIPY["cmmd"], rel=1e-6)


def test_precision_and_recall_are_those_of_scipy_s_trees():
    found = precision_recall(*features())
    assert [found.precision.value, found.recall.value] == pytest.approx(SCIPY["precision, recall"], abs=1e-12)


def test_the_inception_score_is_scipy_s():
    assert inception_score(features()[0], splits=1).value == pytest.approx(SCIPY["inception score"], rel=1e-12)


def test_student_s_quantiles_are_scipy_s():
    for level, quantiles in SCIPY["student"].items():
        assert [student(float(level), degrees) for degrees in DEGREES] == pytest.approx(quantiles, rel=1e-9)


def test_wilson_s_intervals_are_scipy_s():
    for successes, n, low, high in SCIPY["wilson"]:
        assert wilson(successes / n, n, 0.9) == pytest.approx((low, high), abs=1e-9)


def by_scipy():
    """What SCIPY holds, by scipy and numpy alone."""
    from scipy import linalg, special, stats
    from scipy.spatial import cKDTree
    from scipy.spatial.distance import cdist

    def fid(x, y):
        one, other = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = linalg.sqrtm(one @ other) if len(x) > x.shape[1] else np.diag(np.sqrt(linalg.eigvals(one @ other)))
        return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * np.trace(root).real)

    def infinity(x, y):
        sizes, values = [], []
        for count in range(1, 6):
            size = len(x) // count
            sizes.append(size)
            values.append(np.mean([fid(x[block * size : (block + 1) * size], y) for block in range(count)]))
        return float(stats.linregress(1 / np.array(sizes), values).intercept)

    def cubes(x, y):
        return (1 + x @ y.T / x.shape[1]) ** 3

    def kid(x, y):
        within = [(cubes(z, z).sum() - np.trace(cubes(z, z))) / len(z) / (len(z) - 1) for z in (x, y)]
        return float(sum(within) - 2 * cubes(x, y).mean())

    def mmd(x, y):
        x, y = (z / linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        mean = [np.exp(-cdist(a, b, "sqeuclidean") / 200).mean() for a, b in ((x, x), (y, y), (x, y))]
        return float(1000 * (mean[0] + mean[1] - 2 * mean[2]))

    def inside(points, centres):
        radii = cKDTree(centres).query(centres, 4)[0][:, 3]
        return float((cdist(points, centres) <= radii).any(1).mean())

    def score(logits):
        shares = special.softmax(logits, axis=1)
        return float(np.exp(stats.entropy(shares, shares.mean(0, keepdims=True), axis=1).mean()))

    x, y = features()
    wilsons = [(k, n, *stats.binomtest(k, n).proportion_ci(0.9, "wilson")) for k, n in [(0, 5), (3, 7), (500, 500), (41, 1000)]]
    return {
        "fid": fid(x, y),
        "fid of few": fid(*few()),
        "fid infinity": infinity(x, y),
        "kid": kid(x, y),
        "cmmd": mmd(x, y),
        "precision, recall": [inside(x, y), inside(y, x)],
        "inception score": score(x),
        "student": {str(level): stats.t.ppf((1 + level) / 2, DEGREES).tolist() for level in (0.9, 0.95, 0.999)},
        "wilson": [(k, n, float(low), float(high)) for k, n, low, high in wilsons],
    }


if __name__ == "__main__":
    print(json.dumps(by_scipy()))
