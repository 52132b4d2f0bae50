"""Right answers to A4's blanks, written differently from the solution: no test may reject one of them.

RIGHT: (blank's id, how it differs, the function's body without its docstring).
"""
RIGHT = (
    ("A4.1", "A from eigenvectors, in torch", """
        mean1, mean2 = mean1.double(), mean2.double()
        covariance1, covariance2 = covariance1.double(), covariance2.double()
        if mean1.shape != mean2.shape:
            raise UserError("statistics of different sizes cannot be compared")
        values, vectors = torch.linalg.eigh(covariance1)
        A = vectors * values.clamp(min=0).sqrt()
        roots = torch.linalg.eigvalsh(A.T @ covariance2 @ A).clamp(min=0).sqrt().sum()
        distance = (mean1 - mean2).square().sum() + (covariance1 + covariance2).trace() - 2 * roots
        return max(distance.item(), 0.0)
    """),
    ("A4.1", "the nuclear norm of A^T B", """
        if len(mean1) != len(mean2):
            raise UserError(f"{len(mean1)} and {len(mean2)} features cannot be compared")

        def root(covariance):
            values, vectors = np.linalg.eigh(covariance.double().numpy())
            return vectors * np.sqrt(np.maximum(values, 0))

        a, b = root(covariance1), root(covariance2)
        cross = np.linalg.svd(a.T @ b, compute_uv=False).sum()
        away = mean1.double() - mean2.double()
        traces = covariance1.double().trace() + covariance2.double().trace()
        return float(max(0.0, (away @ away + traces).item() - 2 * cross))
    """),
    ("A4.1", "the symmetric root, by eigenvalues", """
        if mean1.numel() != mean2.numel():
            raise UserError("these cannot be compared")
        m1, c1, m2, c2 = [np.array(x, dtype=np.float64) for x in (mean1, covariance1, mean2, covariance2)]
        values, vectors = scipy.linalg.eigh(c2)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        eigenvalues = scipy.linalg.eigvalsh(root @ c1 @ root)
        trace = np.sqrt(np.where(eigenvalues > 0, eigenvalues, 0)).sum()
        distance = np.dot(m1 - m2, m1 - m2) + np.trace(c1 + c2) - 2 * trace
        return float(distance) if distance > 0 else 0.0
    """),
    ("A4.1", "eigenvalues of the product itself", """
        if mean1.shape[0] != mean2.shape[0]:
            raise UserError("cannot be compared")
        away = (mean1.double() - mean2.double()).square().sum()
        C1, C2 = covariance1.double(), covariance2.double()
        roots = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0).sqrt().sum()
        return max(0.0, (away + C1.trace() + C2.trace() - 2 * roots).item())
    """),
    ("A4.2", "torch.cdist in float64", """
        if len(real) <= k or len(fake) <= k:
            raise UserError("too few images for so many neighbours")
        middle = torch.cat((real, fake)).double().mean(0)
        real, fake = real.double() - middle, fake.double() - middle
        slack = 1e-9 * max(real.square().sum(1).max(), fake.square().sum(1).max()).sqrt()

        def share(queries, points):
            reach = []
            for i in range(0, len(points), block):
                near = torch.cdist(points[i:i + block], points, compute_mode="donot_use_mm_for_euclid_dist")
                for row in range(len(near)):
                    near[row, i + row] = math.inf
                reach.append(near.sort(1).values[:, k - 1])
            reach, inside = torch.cat(reach) + slack, 0
            for part in queries.split(block):
                near = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
                inside += (near <= reach).any(1).sum().item()
            return inside / len(queries)

        return share(fake, real), share(real, fake)
    """),
    ("A4.2", "numpy, itself left out by k + 1", """
        if min(real.shape[0], fake.shape[0]) < k + 1:
            raise UserError("too few images")
        a, b = real.double().numpy(), fake.double().numpy()
        centre = a.mean(0)
        a, b = a - centre, b - centre
        slack = 1e-11 * max((a ** 2).sum(1).max(), (b ** 2).sum(1).max())
        squares = lambda x, y: np.maximum((x ** 2).sum(1)[:, None] + (y ** 2).sum(1) - 2 * x @ y.T, 0)
        blocks = lambda x: (x[i:i + block] for i in range(0, len(x), block))

        def covered(queries, points):
            # A point is the nearest to itself, or as near as its copies: leave out one that is at distance 0.
            reach = np.concatenate([np.partition(squares(part, points), k, axis=1)[:, k]
                                    for part in blocks(points)])
            hit = [(squares(q, points) <= reach + slack).any(1) for q in blocks(queries)]
            return float(np.concatenate(hit).mean())

        return covered(b, a), covered(a, b)
    """),
    ("A4.2", "a row at a time, differences", """
        for x in (real, fake):
            if len(x) <= k:
                raise UserError(f"too few images: {len(x)}")
        real, fake = real.double(), fake.double()
        scale = (torch.cat((real, fake)) - real[0]).square().sum(1).max()

        def shares(points, queries):
            radii = []
            for i in range(len(points)):
                others = torch.cat((points[:i], points[i + 1:]))
                radii.append((others - points[i]).square().sum(1).kthvalue(k).values)
            radii = torch.stack(radii) + 1e-11 * scale
            return sum(((points - q).square().sum(1) <= radii).any().item() for q in queries) / len(queries)

        return shares(real, fake), shares(fake, real)
    """),
    ("A4.3", "integers, a loop over images", """
        result = []
        for x, y in zip(a, b):
            squares = (x.long() - y.long()).square().sum().item()
            mean = squares / (x.numel() * 255 ** 2)
            result.append(100.0 if mean < 1e-10 else -10 * math.log10(mean))
        return torch.tensor(result, dtype=torch.float64)
    """),
    ("A4.3", "20 log 255 and where", """
        error = (a.double() - b.double()).pow(2).flatten(1).mean(1)
        value = 20 * math.log10(255) - 10 * torch.log10(error)
        return torch.where(error / 255 ** 2 < 1e-10, torch.full_like(value, 100.0), value)
    """),
    ("A4.3", "in numpy", """
        x, y = a.numpy() / 255.0, b.numpy() / 255.0
        error = np.mean((x - y) ** 2, axis=(1, 2, 3))
        return torch.from_numpy(-10 * np.log10(np.maximum(error, 1e-10)))
    """),
    ("A4.4", "singular values", """
        limit = min(x.shape[1], len(x) - 1)
        if dims > limit:
            raise UserError(f"so many dimensions cannot be had: at most {limit}")
        x = x.double()
        mean = x.mean(0)
        _, s, vt = torch.linalg.svd(x - mean, full_matrices=False)
        share = s.square() / s.square().sum()
        held = share.cumsum(0)
        if not dims:
            dims = 1
            while dims < len(held) and held[dims - 1] < fraction:
                dims += 1
        return mean, vt[:dims].T, float(held[dims - 1])
    """),
    ("A4.4", "np.cov and eigh, whatever is smaller", """
        n, d = x.shape
        if dims > d or dims >= n:
            raise UserError("these dimensions cannot be had")
        data = x.double().numpy()
        values, vectors = np.linalg.eigh(np.cov(data.T))
        order = np.argsort(values)[::-1]
        values, vectors = np.maximum(values[order], 0), vectors[:, order]
        held = np.cumsum(values) / np.sum(values)
        m = dims if dims else min(int(np.searchsorted(held, fraction)) + 1, d)
        return torch.from_numpy(data.mean(0)), torch.from_numpy(vectors[:, :m].copy()), held[m - 1].item()
    """),
    ("A4.4", "scipy's svd", """
        if dims > min(x.shape[1], x.shape[0] - 1):
            raise UserError("dimensions cannot be had")
        data = x.to(torch.float64).numpy()
        mean = data.mean(axis=0)
        s, vt = scipy.linalg.svd(data - mean, full_matrices=False)[1:]
        part = np.cumsum(s ** 2)
        part = part / part[-1]
        if dims == 0:
            dims = int(np.argmax(part >= fraction)) + 1 if (part >= fraction).any() else len(part)
        return torch.from_numpy(mean), torch.from_numpy(vt[:dims].T.copy()), float(part[dims - 1])
    """),
    ("A4.5", "torch.optim.LBFGS and autograd", """
        with torch.enable_grad():
            data = x.detach().double()
            weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
            bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_grad=1e-7,
                                          tolerance_change=1e-12, line_search_fn="strong_wolfe")

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(data @ weight + bias, labels)
                loss = loss + weight.square().sum() / (2 * len(x) * strength)
                loss.backward()
                return loss

            optimizer.step(closure)
        return weight.to(x.dtype), bias.to(x.dtype)
    """),
    ("A4.5", "numpy and scipy, weight and bias apart", """
        data, y = x.double().numpy(), labels.numpy()
        n, d = data.shape
        hot = np.eye(num_classes)[y]

        def objective(parameters):
            W, b = parameters[:d * num_classes].reshape(d, num_classes), parameters[d * num_classes:]
            logits = data @ W + b
            log_p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
            loss = -log_p[np.arange(n), y].mean() + (W ** 2).sum() / (2 * n * strength)
            residual = (np.exp(log_p) - hot) / n
            return loss, np.concatenate(((data.T @ residual + W / (n * strength)).ravel(), residual.sum(0)))

        found = scipy.optimize.minimize(objective, np.zeros((d + 1) * num_classes), jac=True,
                                        method="L-BFGS-B",
                                        options=dict(maxiter=iterations, gtol=1e-7, ftol=1e-14))
        W, b = np.split(found.x, [d * num_classes])
        return torch.from_numpy(W.reshape(d, num_classes)).to(x), torch.from_numpy(b).to(x)
    """),
    ("A4.5", "a column of ones, BFGS", """
        n, d = x.shape
        data = torch.cat((x.double(), torch.ones(n, 1, dtype=torch.float64)), 1)
        mask = torch.ones(d + 1, 1, dtype=torch.float64)
        mask[-1] = 0                                                             # the bias is free

        def objective(flat):
            with torch.enable_grad():
                w = torch.tensor(flat, requires_grad=True)
                matrix = w.reshape(d + 1, num_classes)
                log_p = torch.log_softmax(data @ matrix, 1)
                loss = -log_p.gather(1, labels[:, None]).mean()
                loss = loss + (matrix * mask).pow(2).sum() / 2 / n / strength
                gradient, = torch.autograd.grad(loss, w)
            return loss.item(), gradient.numpy()

        result = scipy.optimize.minimize(objective, np.zeros((d + 1) * num_classes), jac=True, method="BFGS",
                                         options={"maxiter": iterations, "gtol": 1e-6})
        matrix = torch.from_numpy(result.x).to(x.dtype).view(d + 1, num_classes)
        return matrix[:d], matrix[d]
    """),
    ("A4.6", "the largest taken out by hand, in place", """
        parts = []
        for joint in log_joint(mixture, x):
            largest = joint.max(dim=0).values
            parts.append(-(largest + joint.sub_(largest).exp_().sum(0).log_()))
        return torch.cat(parts)
    """),
    ("A4.6", "numpy's logaddexp", """
        blocks = [joint.numpy() for joint in log_joint(mixture, x)]
        return torch.from_numpy(-np.logaddexp.reduce(np.concatenate(blocks, axis=1), axis=0))
    """),
    ("A4.6", "scipy's logsumexp, the result filled in", """
        from scipy.special import logsumexp
        result, start = torch.empty(len(x), dtype=x.dtype), 0
        for joint in log_joint(mixture, x):
            result[start:start + joint.shape[1]] = torch.from_numpy(-logsumexp(joint.numpy(), axis=0))
            start += joint.shape[1]
        return result
    """),
    ("A4.6", "torch.distributions", """
        d = torch.distributions
        if mixture.covariances.ndim == 3:
            parts = d.MultivariateNormal(mixture.means, mixture.covariances)
        else:
            parts = d.Independent(d.Normal(mixture.means, mixture.covariances.sqrt()), 1)
        return -d.MixtureSameFamily(d.Categorical(mixture.weights), parts).log_prob(x)
    """),
    ("A4.7", "softmax and logsumexp", """
        blocks = list(log_joint(mixture, x))
        joint = torch.cat(blocks, dim=1)
        mean = joint.double().logsumexp(0).mean().item()
        return weighted_gaussians(joint.softmax(0), x, mixture.covariances.dim() == 3), mean
    """),
    ("A4.7", "through negative_log_likelihood", """
        value = -negative_log_likelihood(mixture, x).double().mean().item()
        shares = torch.cat([torch.exp(joint - torch.logsumexp(joint, 0, keepdim=True))
                            for joint in log_joint(mixture, x)], -1)
        return weighted_gaussians(shares, x, full=mixture.covariances.ndim > 2), value
    """),
    ("A4.7", "numpy, a list of sums", """
        shares, sums = [], []
        for joint in log_joint(mixture, x):
            joint = joint.numpy().astype(np.float64)
            total = np.logaddexp.reduce(joint, axis=0)
            shares.append(np.exp(joint - total))
            sums.extend(total.tolist())
        r = torch.from_numpy(np.hstack(shares)).to(x.dtype)
        return weighted_gaussians(r, x, mixture.covariances.ndim == 3), math.fsum(sums) / len(sums)
    """),
    ("A4.7", "an M-step of its own", """
        joint = torch.cat(list(log_joint(mixture, x)), 1).T.double()                               # (n, K)
        total = joint.logsumexp(1)
        r, data = (joint - total[:, None]).exp(), x.double()
        counts = r.sum(0)
        means = r.T @ data / counts[:, None]
        away = data[:, None] - means                                                               # (n, K, d)
        if mixture.covariances.ndim == 3:
            covariances = torch.einsum("nk,nkd,nke->kde", r, away, away) / counts[:, None, None]
            covariances = covariances + REGULARISATION * torch.eye(x.shape[1], dtype=torch.float64)
        else:
            covariances = torch.einsum("nk,nkd->kd", r, away ** 2) / counts[:, None] + REGULARISATION
        return GaussianMixture(counts / len(x), means, covariances), total.sum().item() / len(x)
    """),
    ("A4.8", "torch.distributions and autograd", """
        with torch.enable_grad():
            x, d = x.detach().requires_grad_(), torch.distributions
            modes = d.Independent(d.Normal(means * math.exp(-t), torch.ones_like(means)), 1)
            density = d.MixtureSameFamily(d.Categorical(torch.ones(len(means), dtype=x.dtype)), modes)
            return torch.autograd.grad(density.log_prob(x).sum(), x, create_graph=means.requires_grad)[0]
    """),
    ("A4.8", "the gradient of the log-density, by autograd", """
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            away = x[:, None] - means * math.exp(-t)
            density = torch.logsumexp(-away.square().sum(-1) / 2, dim=1)
            return torch.autograd.grad(density.sum(), x, create_graph=True)[0]
    """),
    ("A4.8", "cdist and einsum", """
        mu = means * np.exp(-t)
        w = torch.softmax(-0.5 * torch.cdist(x, mu) ** 2, dim=-1)
        return torch.einsum("nk,kd->nd", w, mu) - x
    """),
    ("A4.8", "differences to each component, weighted", """
        mu = math.exp(-t) * means
        away = mu[None] - x[:, None]                                                # (n, K, d)
        logits = -0.5 * (away * away).sum(2)
        weights = (logits - logits.logsumexp(1, keepdim=True)).exp()
        return (weights[..., None] * away).sum(1)
    """),
)
