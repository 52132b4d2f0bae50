"""metrics.py against scipy, scikit-learn, scikit-image, naive loops and closed forms."""
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import metrics
from common import UserError
from measures.features import FeatureStatistics, frechet_between
from measures.latent_space import discriminant_axes


def statistics(x):
    result = FeatureStatistics(x.shape[1])
    for part in x.split(7):
        result.update(part)
    return result


def sqrtm_distance(x, y):
    """FID as its definition has it, with numpy's covariance and scipy's matrix square root."""
    a, b = np.cov(x.T.numpy()), np.cov(y.T.numpy())
    root = scipy.linalg.sqrtm(a @ b)
    return ((x.mean(0) - y.mean(0)).square().sum().item() + np.trace(a + b - 2 * np.real(root)))


def random_pair(n, m, d):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, d, generator=g, dtype=torch.float64)
    return draw(n) @ draw(d), draw(m) @ draw(d) + draw(1)


# --------------------------------------------- Fréchet distance --------------------------------------------

def test_frechet_distance_equals_sqrtm():
    x, y = random_pair(200, 150, 20)
    found = frechet_between(statistics(x), statistics(y))
    assert found == pytest.approx(sqrtm_distance(x, y), rel=1e-9)


def test_frechet_distance_of_commuting_gaussians_in_closed_form():
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    a, b = torch.rand(30).double() * 5, torch.rand(30).double() * 5
    m = torch.randn(30).double()
    found = metrics.frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T)
    assert found == pytest.approx((m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item(), rel=1e-9)


def test_frechet_distance_of_fewer_images_than_features():
    """Both covariances are singular. With centred rows A and B in place of covariances, the trace of the root
    is the nuclear norm of A B^T / sqrt((n - 1)(m - 1)): no root of a singular matrix is needed."""
    x, y = random_pair(15, 11, 40)
    a, b = (rows - rows.mean(0) for rows in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(14 * 10)
    expected = ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 14 + b.square().sum() / 10
                - 2 * cross).item()
    found = frechet_between(statistics(x), statistics(y))
    assert found == pytest.approx(expected, rel=1e-7)
    assert found == pytest.approx(sqrtm_distance(x, y), rel=1e-4)


@pytest.mark.parametrize("n", [12, 300])
def test_identical_sets_are_at_distance_0(n):
    x = random_pair(n, 2, 40)[0]
    scale = x.var(0).sum().item()
    assert frechet_between(statistics(x), statistics(x)) <= 1e-7 * scale


def test_near_singular_covariances():
    """Variances over 14 decades, where FID tools resort to 1e-6 on the diagonal, against the closed form."""
    q = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q
    a, b = torch.logspace(0, -14, 40).double(), torch.logspace(-14, 0, 40).double()
    found = metrics.frechet_distance(torch.zeros(40), q * a @ q.T, torch.zeros(40), q * b @ q.T)
    assert found == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-5)


def test_constant_features():
    x, y = torch.full((50, 8), 3.0), torch.full((50, 8), 5.0)
    assert frechet_between(statistics(x), statistics(y)) == pytest.approx(8 * 4)
    z = torch.randn(500, 8)
    expected = (z.mean(0) - 3).square().sum() + z.var(0).sum()        # a point and a cloud: no cross term
    assert frechet_between(statistics(x), statistics(z)) == pytest.approx(expected.item(), rel=1e-5)


def test_streamed_statistics_equal_one_pass():
    x = torch.randn(101, 10) * 3 + 1000                     # far from 0: sums of squares would lose digits
    whole = FeatureStatistics(10)
    for part in x.split((5, 60, 36)):                                # 5 < d vectors: not folded yet
        whole.update(part)
    mean, covariance = whole.mean_and_covariance()
    assert whole.count == 101
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().T), rtol=1e-9, atol=1e-9)


def test_memory_of_statistics_does_not_grow():
    stream = FeatureStatistics(16)
    for _ in range(50):
        stream.update(torch.randn(30, 16))
        assert sum(map(len, stream.waiting)) < 16
    assert stream.count == 1500


def test_bad_features_are_named():
    stream = FeatureStatistics(4)
    with pytest.raises(UserError, match="NaN"):
        stream.update(torch.tensor([[1.0, 2.0, float("nan"), 0.0]]))
    stream.update(torch.zeros(1, 4))
    with pytest.raises(UserError, match="too few images"):
        stream.mean_and_covariance()
    with pytest.raises(UserError, match="cannot be compared"):
        metrics.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(UserError, match="too few images"):
        metrics.precision_recall(torch.zeros(3, 4), torch.zeros(9, 4))


# --------------------------------- Inception Score, precision, recall ---------------------------------

def test_inception_score_of_sure_balanced_predictions_is_the_number_of_classes():
    sure = torch.eye(7).repeat(20, 1) * 1000
    assert metrics.inception_score(sure)[0] == pytest.approx(7)
    assert metrics.inception_score(torch.zeros(50, 7))[0] == pytest.approx(1)


def test_inception_score_by_the_definition_in_chunks_of_file_order():
    logits = torch.randn(25, 6)
    scores = []
    for start in (0, 10, 20):
        p = np.exp(logits[start:start + 10].double().numpy())
        p /= p.sum(1, keepdims=True)
        divergences = [sum(q * math.log(q / m) for q, m in zip(row, p.mean(0))) for row in p]
        scores.append(math.exp(np.mean(divergences)))
    mean, std = metrics.inception_score(logits, chunk=10)
    assert mean == pytest.approx(np.mean(scores)) and std == pytest.approx(np.std(scores))


def test_precision_and_recall_count_equal_distances():
    """Integer features: many distances are equal. The oracle counts in whole numbers,
    where equal is equal."""
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 3, (200, 6)), rng.integers(0, 3, (220, 6)) + (rng.random((220, 6)) < 0.1)

    def covered(queries, points, k=3):
        distances = np.square(points[:, None] - points).sum(-1)
        reach = np.sort(distances, 1)[:, k]                                     # [:, 0] is the point itself
        return (np.square(queries[:, None] - points).sum(-1) <= reach).any(1).mean()

    found = metrics.precision_recall(torch.from_numpy(real).float(), torch.from_numpy(fake).float())
    assert found == pytest.approx((covered(fake, real), covered(real, fake)))


@pytest.mark.parametrize("d", [3, 300, 2048])
def test_precision_and_recall_of_duplicates_and_of_what_nearly_is_one(d):
    """Balls of radius 0 hold copies, and nothing that is moved by more than float32's rounding; elsewhere the
    answers are float64's."""
    g = torch.Generator().manual_seed(d)
    real = torch.randn(40, d, generator=g).repeat(4, 1) + 30
    near = real[:40] + 0.02 * torch.randn(40, d, generator=g)
    assert metrics.precision_recall(real, torch.cat((real[:60], near))) == (0.6, 1)
    a, b = torch.randn(2, 300, d, generator=g)
    b = 0.9 * b + 0.1

    def covered(queries, points):
        between = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        reach = between.fill_diagonal_(torch.inf).kthvalue(3, dim=1).values
        inside = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return (inside <= reach).any(1).double().mean().item()

    assert metrics.precision_recall(a, b) == pytest.approx((covered(b, a), covered(a, b)))


def test_precision_and_recall_by_brute_force():
    g = torch.Generator().manual_seed(1)
    real = torch.randn(60, 3, generator=g) + 100                                # far from 0
    fake = torch.randn(45, 3, generator=g) + 101.2

    def covered(queries, points, k=3):
        balls = []
        for i, p in enumerate(points):
            distances = sorted(float((p - q).double().square().sum()) for j, q in enumerate(points) if j != i)
            balls.append(distances[k - 1])
        inside = [any(float((q - p).double().square().sum()) <= r for p, r in zip(points, balls))
                  for q in queries]
        return sum(inside) / len(queries)

    for block in (7, 1000):
        precision, recall = metrics.precision_recall(real, fake, block=block)
        assert precision == covered(fake, real) and recall == covered(real, fake)
    assert 0 < precision < 1 and 0 < recall < 1                    # the case is not a trivial one
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 50) == (0, 0)


# --------------------------------------------- PSNR and SSIM ---------------------------------------------

@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_psnr_and_ssim_equal_scikit_image(data_range):
    oracles = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (3, 3, 20, 33), generator=g, dtype=torch.uint8)
    b = (a.float() + torch.randn(a.shape, generator=g) * 30).clamp(0, 255).to(torch.uint8)
    for x, y, p, s in zip(a, b, metrics.psnr(a, b), metrics.ssim(a, b, data_range)):
        x, y = x.numpy() / 255, y.numpy() / 255
        oracle = oracles.structural_similarity(x, y, channel_axis=0, data_range=data_range)
        assert s.item() == pytest.approx(oracle, abs=1e-12)
        assert p.item() == pytest.approx(oracles.peak_signal_noise_ratio(x, y, data_range=1))
    assert metrics.psnr(a, a).tolist() == [100] * 3 and metrics.ssim(a, a).tolist() == pytest.approx([1] * 3)


def test_psnr_by_hand():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 256, (2, 3, 3, 6, 5), generator=g, dtype=torch.uint8)
    b[1] = a[1]
    b[2] = (a[2].int() + torch.where(a[2] < 128, 3, -3)).to(torch.uint8)
    found = metrics.psnr(a, b)
    error = ((a[0].numpy() / 255 - b[0].numpy() / 255) ** 2).mean()
    assert found.shape == (3,) and found.dtype == torch.float64
    assert found.tolist() == pytest.approx([-10 * math.log10(error), 100, 20 * math.log10(255 / 3)])


def test_ssim_of_images_smaller_than_its_window_is_refused():
    with pytest.raises(UserError, match="7 x 7"):
        metrics.ssim(*[torch.zeros(1, 3, 6, 9, dtype=torch.uint8)] * 2)


# --------------------------------------------- the latent space ---------------------------------------------

def test_linear_probe_equals_scikit_learn():
    scale = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    regression = pytest.importorskip("sklearn.linear_model").LogisticRegression(
        C=1.0, tol=1e-10, max_iter=2000)
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (300,), generator=g)
    x = torch.randn(300, 6, generator=g, dtype=torch.float64) + torch.randn(4, 6, generator=g)[y]
    x, = metrics.standardise(x)
    np.testing.assert_allclose(x, scale.fit_transform(x), atol=1e-12)
    weight, bias = metrics.linear_probe(x, y, 4, iterations=1000)
    oracle = regression.fit(x, y)
    np.testing.assert_allclose((x @ weight + bias).softmax(1), oracle.predict_proba(x), atol=2e-4)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_linear_probe_is_at_the_minimum_of_its_loss(strength):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (200,), generator=g)
    x = torch.randn(200, 5, generator=g, dtype=torch.float64) + torch.randn(4, 5, generator=g)[y] + 0.3
    weight, bias = (p.detach().requires_grad_()
                    for p in metrics.linear_probe(x, y, 4, strength, iterations=1000))
    assert weight.shape == (5, 4) and bias.shape == (4,) and bias.abs().max() > 0.01
    loss = (torch.nn.functional.cross_entropy(x @ weight + bias, y)
            + weight.square().sum() / (2 * 200 * strength))
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [(200, 12), (9, 12)])
def test_pca_is_the_singular_value_decomposition(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=g, dtype=torch.float64) * torch.linspace(3, 0.1, 12) + 5
    _, s, vt = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    held = np.cumsum(s ** 2) / np.sum(s ** 2)
    for fraction, dims, m in ((0.9, 0, int(np.argmax(held >= 0.9)) + 1),
                              (0.5, 0, int(np.argmax(held >= 0.5)) + 1), (0.9, 5, 5)):
        mean, axes, found = metrics.pca(x, fraction, dims)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        assert axes.shape == (12, m) and found == pytest.approx(held[m - 1])
        np.testing.assert_allclose((axes.T.numpy() @ vt[:m].T).__abs__(), np.eye(m), atol=1e-8)
    with pytest.raises(UserError, match="dimensions cannot be had"):
        metrics.pca(x, dims=13)


@pytest.mark.parametrize("shape", [(200, 12), (9, 12)])
def test_pca_equals_scikit_learn(shape):
    x = torch.randn(*shape, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    mean, axes, held = metrics.pca(x, 0.9)
    oracle = pytest.importorskip("sklearn.decomposition").PCA(0.9).fit(x.numpy())
    assert axes.shape[1] == oracle.n_components_
    assert held == pytest.approx(oracle.explained_variance_ratio_.sum())
    np.testing.assert_allclose(((x - mean) @ axes).abs(), np.abs(oracle.transform(x.numpy())), atol=1e-9)
    assert metrics.pca(x, dims=5)[1].shape == (12, 5)
    with pytest.raises(UserError, match="dimensions cannot be had"):
        metrics.pca(x, dims=13)


def mixture_data(n=400, d=5, K=4):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(K, d)) * 2
    x = centres[rng.integers(K, size=n)] + rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 0.5
    return metrics.standardise(torch.from_numpy(x))[0]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["full", "diag"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_em_takes_the_same_steps_as_scikit_learn(kind, dtype, tolerance):
    Oracle = pytest.importorskip("sklearn.mixture").GaussianMixture
    x = mixture_data()
    mixture = metrics.start_mixture(x, 4, kind == "full", np.random.default_rng(1))
    precisions = torch.linalg.inv(mixture.covariances) if kind == "full" else 1 / mixture.covariances
    oracle = Oracle(4, covariance_type=kind, max_iter=6, tol=0, weights_init=mixture.weights.numpy(),
                    means_init=mixture.means.numpy(), precisions_init=precisions.numpy()).fit(x.numpy())
    for _ in range(6):
        mixture, _ = metrics.em_step(mixture, x.to(dtype))
    for ours, theirs in zip(mixture, (oracle.weights_, oracle.means_, oracle.covariances_)):
        np.testing.assert_allclose(ours, theirs, atol=tolerance)
    np.testing.assert_allclose(-metrics.negative_log_likelihood(mixture, x), oracle.score_samples(x.numpy()),
                               atol=20 * tolerance)


def given_mixture(full, K=3, d=4):
    rng = np.random.default_rng(2)
    roots = rng.normal(size=(K, d, d))
    covariances = roots @ roots.transpose(0, 2, 1) + np.eye(d) if full else rng.uniform(0.5, 2, (K, d))
    return metrics.GaussianMixture(*map(torch.from_numpy,
                                        (np.array([0.2, 0.5, 0.3]), rng.normal(size=(K, d)) * 2,
                                         covariances)))


@pytest.mark.parametrize("full", [True, False])
def test_likelihood_is_that_of_torchs_mixture(full):
    mixture = given_mixture(full)
    x = torch.randn(50, 4, dtype=torch.float64) * 3
    x[0] = 300.0                                              # far from all: densities of e^-10000 and less
    d = torch.distributions
    parts = (d.MultivariateNormal(mixture.means, mixture.covariances) if full else
             d.Independent(d.Normal(mixture.means, mixture.covariances.sqrt()), 1))
    oracle = d.MixtureSameFamily(d.Categorical(mixture.weights), parts)
    torch.testing.assert_close(metrics.negative_log_likelihood(mixture, x), -oracle.log_prob(x))


@pytest.mark.parametrize("full", [True, False])
def test_an_em_step_is_the_textbooks(full, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)                  # 64 vectors at a time: several blocks
    mixture = given_mixture(full)
    x = np.random.default_rng(3).normal(size=(150, 4)) * 2
    joint = np.zeros((150, 3))
    for k, (weight, mean, covariance) in enumerate(zip(*(part.numpy() for part in mixture))):
        normal = scipy.stats.multivariate_normal(mean, covariance if full else np.diag(covariance))
        joint[:, k] = weight * normal.pdf(x)
    share = joint / joint.sum(1, keepdims=True)
    found, value = metrics.em_step(mixture, torch.from_numpy(x))
    assert value == pytest.approx(np.log(joint.sum(1)).mean())
    np.testing.assert_allclose(found.weights, share.mean(0), rtol=1e-6)
    for k in range(3):
        mean = (share[:, k:k + 1] * x).sum(0) / share[:, k].sum()
        covariance = (share[:, k:k + 1] * (x - mean)).T @ (x - mean) / share[:, k].sum()
        np.testing.assert_allclose(found.means[k], mean, atol=1e-6)
        np.testing.assert_allclose(found.covariances[k], covariance if full else np.diag(covariance),
                                   atol=1e-5)


def test_likelihood_never_falls_over_em_steps():
    x = mixture_data()
    mixture, values = metrics.start_mixture(x, 6, True, np.random.default_rng(0)), []
    for _ in range(15):
        mixture, value = metrics.em_step(mixture, x)
        values.append(value)
    assert all(later >= earlier - 1e-9 for earlier, later in zip(values, values[1:]))
    assert values[-1] > values[0] + 0.1


def test_the_fit_is_the_best_start():
    x = mixture_data()
    fits = [metrics.fit_mixture(x, 6, starts=starts)[1] for starts in (1, 4)]
    assert fits[1] >= fits[0]
    best, value = metrics.fit_mixture(x, 6, starts=4)
    assert -metrics.negative_log_likelihood(best, x).mean().item() == pytest.approx(value)


def test_a_mixture_finds_the_clusters_it_is_drawn_from():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [8, 0], [0, 8.0]])
    x = torch.from_numpy(centres[rng.integers(3, size=900)] + rng.normal(size=(900, 2)))
    mixture, _ = metrics.fit_mixture(x, 3)
    order = [int((mixture.means - torch.from_numpy(c)).norm(dim=1).argmin()) for c in centres]
    np.testing.assert_allclose(mixture.means[order], centres, atol=0.15)
    np.testing.assert_allclose(mixture.covariances[order], np.stack([np.eye(2)] * 3), atol=0.25)


def test_one_gaussian_on_whitened_latents_has_the_likelihood_that_does_not_depend_on_them():
    """Why NLL curves compare at equal d only: at K = 1 it is d/2 (1 + ln 2 pi), whatever the latents."""
    for scale in (1, 50):
        x = torch.randn(500, 30, dtype=torch.float64) ** 3 * scale
        mean, axes, _ = metrics.pca(x, 0.9)
        z, = metrics.standardise((x - mean) @ axes)
        expected = -z.shape[1] / 2 * (1 + math.log(2 * math.pi))
        assert metrics.fit_mixture(z, 1)[1] == pytest.approx(expected, abs=1e-4)


def test_components_that_shrink_to_a_point_stay_valid():
    x = torch.cat((torch.randn(40, 3).double(), torch.full((30, 3), 2.0).double()))     # 30 equal vectors
    mixture, value = metrics.fit_mixture(x, 3)
    assert math.isfinite(value) and torch.linalg.eigvalsh(mixture.covariances).min() >= 0.9e-6
    with pytest.raises(UserError, match="too few"):
        metrics.fit_mixture(x[:5], 3)


def test_discriminant_axes_are_scikit_learns():
    """Of five classes in eight dimensions with unequal spreads: the same plane,
    and test vectors as far apart."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 4000)
    mix = rng.standard_normal((8, 8)) * np.geomspace(3, 0.3, 8)
    x = (2 * rng.standard_normal((5, 8))[y] + rng.standard_normal((4000, 8))) @ mix
    axes = discriminant_axes(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    discriminant = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    oracle = discriminant(solver="eigen", n_components=2).fit(x, y)
    for ours, theirs in zip((x @ axes).T, oracle.transform(x).T):
        assert abs(np.corrcoef(ours, theirs)[0, 1]) > 0.999
        within = np.mean([ours[y == c].var() for c in range(5)])
        assert within == pytest.approx(1, rel=0.05)
