"""Right answers to A3's blanks, written differently from the solution: no test may reject one of them.

RIGHT: (blank's id, how it differs, the function's body without its docstring).
"""
RIGHT = (
    ("A3.1", "derivatives by autograd", """
        if path not in ("linear", "cosine"):
            raise ValueError("choose linear or cosine")
        with torch.enable_grad():
            time = t if t.requires_grad else t.detach().clone().requires_grad_()
            if path == "linear":
                alpha, sigma = 1.0 - time, 1.0 * time
            else:
                alpha, sigma = torch.cos(time * math.pi / 2), torch.sin(time * math.pi / 2)
            d_alpha, = torch.autograd.grad(alpha.sum(), time, create_graph=t.requires_grad)
            d_sigma, = torch.autograd.grad(sigma.sum(), time, create_graph=t.requires_grad)
        found = alpha, sigma, d_alpha, d_sigma
        return found if t.requires_grad else tuple(part.detach() for part in found)
    """),
    ("A3.1", "full_like, and sin for cos", """
        if path == "linear":
            return 1 - t, 0 + t, torch.full_like(t, -1), torch.full_like(t, 1)
        elif path == "cosine":
            angle = t * (math.pi / 2)
            return (angle.cos(), angle.sin(), -(math.pi / 2) * angle.sin(),
                    (math.pi / 2) * angle.cos())
        else:
            raise ValueError("path must be linear or cosine, not " + repr(path))
    """),
    ("A3.1", "a table of functions", """
        h = np.pi / 2
        table = {"linear": (lambda t: 1 - t, lambda t: t.clone(), lambda t: 0 * t - 1, lambda t: 0 * t + 1),
                 "cosine": (lambda t: (h * t).cos(), lambda t: (h * t).sin(),
                            lambda t: (h * t).sin() * -h, lambda t: (h * t).cos() * h)}
        try:
            functions = table[path]
        except KeyError:
            raise ValueError(f"{path}: linear or cosine") from None
        return tuple(f(t) for f in functions)
    """),
    ("A3.2", "view, and addcmul", """
        a, s, da, ds = (c.view(-1, 1, 1) for c in path_coefficients(t, path))
        return torch.addcmul(a * x, s, noise), torch.addcmul(da * x, ds, noise)
    """),
    ("A3.2", "einsum", """
        a, s, da, ds = path_coefficients(t, path)
        mix = lambda p, q: torch.einsum("b,blc->blc", p, x) + torch.einsum("b,blc->blc", q, noise)
        return mix(a, s), mix(da, ds)
    """),
    ("A3.2", "a sample at a time", """
        states, velocities = [], []
        for b in range(x.shape[0]):
            a, s, da, ds = path_coefficients(t[b], path)
            states.append(s * noise[b] + a * x[b])
            velocities.append(ds * noise[b] + da * x[b])
        return torch.stack(states), torch.stack(velocities)
    """),
    ("A3.3", "F.mse_loss", """
        from torch.nn.functional import mse_loss
        return mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)
    """),
    ("A3.3", "a loop and float64, the target detached", """
        losses = [((p.double() - t.double()) ** 2).sum() / p.numel()
                  for p, t in zip(prediction, target.detach())]
        return torch.stack(losses).to(torch.float32)
    """),
    ("A3.3", "mean over tokens, then channels", """
        difference = target.to(torch.float32) - prediction.to(torch.float32)
        return torch.pow(difference, 2).mean(dim=1).mean(dim=1)
    """),
    ("A3.3", "einsum", """
        d = (prediction.double() - target.double()).float()
        return torch.einsum("blc,blc->b", d, d) / d[0].numel()
    """),
    ("A3.4", "a clone, then an index", """
        result = y.clone()
        for i, rng in enumerate(rngs):
            if rng.random() < probability:
                result[i] = null_class
        return result
    """),
    ("A3.4", "numpy and masked_fill", """
        coins = np.array([rng.random() for rng in rngs])
        return y.masked_fill(torch.from_numpy(coins < probability).to(y.device), null_class)
    """),
    ("A3.4", "arithmetic on integers", """
        drop = [int(rng.random() < probability) for rng in rngs]
        drop = torch.as_tensor(drop, dtype=y.dtype).to(y.device)
        return y * (1 - drop) + null_class * drop
    """),
    ("A3.5", "two fractions", """
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1)
        alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in path_coefficients(t, path))
        determinant = alpha * d_sigma - sigma * d_alpha
        return (alpha / determinant) * v - (d_alpha / determinant) * x
    """),
    ("A3.5", "the inverse of a 2 x 2 matrix", """
        if not isinstance(t, torch.Tensor):
            t = torch.full((1,), float(t), dtype=x.dtype, device=x.device)
        a, s, da, ds = path_coefficients(t.to(x.device, x.dtype).flatten(), path)
        matrix = torch.stack((torch.stack((a, s), -1), torch.stack((da, ds), -1)), -2)  # (B, 2, 2)
        wide = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
        row = torch.linalg.inv(wide)[:, 1].to(x.dtype)[..., None, None]                 # (B, 2, 1, 1)
        return row[:, 0] * x + row[:, 1] * v
    """),
    ("A3.5", "one formula per path", """
        if isinstance(t, torch.Tensor):
            t = t.to(x).view(-1, 1, 1)
        if path == "linear":
            return x + (1 - t) * v
        h = math.pi / 2
        t = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)
        return (x * torch.sin(h * t) + v * torch.cos(h * t) / h).to(x.dtype)
    """),
    ("A3.6", "a list of quotients", """
        if steps <= 0:
            raise ValueError("at least one step, please")
        if last is None:
            return [(steps - i) / steps for i in range(steps + 1)]
        if last <= 0 or last >= 1:
            raise ValueError("last must lie between 0 and 1")
        if steps == 1:
            return [1.0, 0.0]
        return [1 - i * (1 - last) / (steps - 1) for i in range(steps)] + [0.0]
    """),
    ("A3.6", "np.linspace", """
        if last is not None and not (0 < last < 1):
            raise ValueError("last is out of (0, 1)")
        if steps < 1:
            raise ValueError("at least one step is needed")
        if last is None:
            return list(np.linspace(1.0, 0.0, steps + 1))
        return np.append(np.linspace(1.0, last, steps), 0.0).tolist()
    """),
    ("A3.7", "a while loop and a list of states", """
        kind, states, i = x.dtype, [precise(x)], 0
        while i + 1 < len(times):
            answer = velocity(states[-1], times[i]).to(states[-1])
            states.append(states[-1] - (times[i] - times[i + 1]) * answer)
            i += 1
        return states[-1].to(kind)
    """),
    ("A3.7", "torch.add into a copy", """
        original = x.dtype
        state = precise(x).clone()
        for i in range(1, len(times)):
            dt = times[i] - times[i - 1]
            state = torch.add(state, velocity(state, times[i - 1]).to(state.dtype), alpha=dt)
        return state.to(original)
    """),
    ("A3.7", "in place in its own copy", """
        dtype, state = x.dtype, precise(x).clone()
        for now, then in zip(times[:-1], times[1:]):
            state += velocity(state, now).double() * (then - now)
        return state.to(dtype)
    """),
    ("A3.8", "halves of two steps", """
        dtype, x = x.dtype, precise(x)
        for i in range(len(times) - 1):
            dt = times[i + 1] - times[i]
            first = velocity(x, times[i]).to(x.dtype)
            if i == len(times) - 2:
                x = x + dt * first
            else:
                second = velocity(x + dt * first, times[i + 1]).to(x.dtype)
                x = x + 0.5 * dt * first + 0.5 * dt * second
        return x.to(dtype)
    """),
    ("A3.8", "predicts first, corrects the prediction", """
        dtype, state = x.dtype, precise(x)
        for t, t_next in zip(times[:-1], times[1:]):
            h = t_next - t
            v = velocity(state, t).to(state)
            predicted = state + h * v
            if t_next != 0:
                predicted = predicted + h / 2 * (velocity(predicted, t_next).to(state) - v)
            state = predicted
        return state.to(dtype)
    """),
    ("A3.9", "by the score, sigma from each time", """
        dtype, x = x.dtype, precise(x)
        n = len(times) - 1
        for step in range(n):
            t, dt = times[step], times[step + 1] - times[step]
            sigma = path_coefficients(torch.tensor(t, dtype=torch.float64), path)[1].item()
            v = velocity(x, t).to(x)
            score = -expected_noise(v, x, t, path) / sigma
            w = 2 * sigma
            x = x + dt * (v - w / 2 * score)
            if step < n - 1:
                n_t = torch.randn_like(x) if noise is None else noise(step).to(x)
                x = x + w ** 0.5 * (-dt) ** 0.5 * n_t
        return x.to(dtype)
    """),
    ("A3.9", "the last step after the loop", """
        dtype, x = x.dtype, precise(x)
        if noise is None:
            noise = lambda step: torch.randn(x.shape, dtype=x.dtype, device=x.device)

        def drifted(x, t, t_next):
            v = velocity(x, t).to(x)
            return x - (v + expected_noise(v, x, t, path)) * (t - t_next)

        for step in range(len(times) - 2):
            t, t_next = times[step], times[step + 1]
            x = drifted(x, t, t_next)
            w = 2 * (t if path == "linear" else math.sin(math.pi / 2 * t))
            x = x + noise(step).to(x.dtype) * math.sqrt(w * (t - t_next))
        x = drifted(x, times[-2], times[-1])
        return x.to(dtype)
    """),
    ("A3.10", "a loop over the weights", """
        widest = None
        for p in model.parameters():
            widest = p.dtype if widest is None else torch.promote_types(widest, p.dtype)
        B = x.size(0)
        more = {key: torch.ones(B, device=x.device) * value for key, value in more.items()}
        time = torch.ones(B, device=x.device) * t
        return model(x.to(widest), time, y, **more).to(x.dtype)
    """),
    ("A3.10", "lists made tensors, y by name", """
        dtype = functools.reduce(torch.promote_types, [p.dtype for p in model.parameters()])
        inputs = {name: torch.tensor([value] * len(x), dtype=torch.float32).to(x.device)
                  for name, value in dict(more, t=t).items()}
        return model(x.type(dtype), inputs.pop("t"), y=y, **inputs).type(x.dtype)
    """),
    ("A3.11", "math.isclose", """
        low, high = interval
        close = lambda a, b: math.isclose(a, b, rel_tol=0, abs_tol=1e-6)
        return low < t < high or close(t, low) or close(t, high)
    """),
    ("A3.11", "the distance from the middle", """
        low, high = interval
        return bool(abs(t - (low + high) / 2) <= (high - low) / 2 + 1e-6)
    """),
    ("A3.12", "weights g and 1 - g, tensors repeated", """
        classes = model.config.num_classes
        if cfg_scale != 1 and not classes:
            raise UserError("an unconditional model has no guidance")
        labels = torch.cat([y, torch.full_like(y, classes)])

        def velocity(x, t, **more):
            if cfg_scale != 1 and inside(t, interval):
                both = call(model, x.repeat(2, 1, 1), t, labels, **more)
                return cfg_scale * both[:len(x)] + (1 - cfg_scale) * both[len(x):]
            return call(model, x, t, y, **more)
        return velocity
    """),
    ("A3.12", "two functions, one chosen at each call", """
        n = model.config.num_classes
        if n == 0 and cfg_scale != 1.0:
            raise UserError("--cfg needs classes: this is an unconditional model")

        def plain(x, t, **more):
            return call(model, x, t, y, **more)

        def guided(x, t, **more):
            pair = torch.stack((x, x)).flatten(0, 1)
            c, u = call(model, pair, t, torch.cat((y, y * 0 + n)), **more).unflatten(0, (2, -1))
            return torch.lerp(u, c, cfg_scale)

        chosen = lambda t: guided if cfg_scale != 1.0 and inside(t, interval) else plain
        return lambda x, t, **more: chosen(t)(x, t, **more)
    """),
    ("A3.13", "addcmul", """
        return torch.addcmul(x + shift, x, scale)
    """),
    ("A3.13", "three terms", """
        return shift + x + scale * x
    """),
)
