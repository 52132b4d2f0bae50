"""Right answers to A1's blanks, written differently from the solution: no test may reject one of them.

RIGHT: (blank's id, how it differs, the function's body without its docstring).
"""
RIGHT = (
    ("A1.1", "F.unfold, values reordered", """
        H, W = images.shape[-2:]
        if H % patch_size != 0 or W % patch_size != 0:
            raise ValueError("sides must be multiples of the patch size")
        columns = F.unfold(images, patch_size, stride=patch_size)
        B, length, N = columns.shape
        pixels = columns.transpose(1, 2).reshape(B, N, images.shape[1], patch_size * patch_size)
        return pixels.transpose(2, 3).reshape(B, N, length)
    """),
    ("A1.1", "a loop over patches", """
        H, W = images.shape[-2:]
        if (H // patch_size * patch_size, W // patch_size * patch_size) != (H, W):
            raise ValueError("multiples")
        patches = []
        for top in range(0, H, patch_size):
            for left in range(0, W, patch_size):
                patch = images[:, :, top:top + patch_size, left:left + patch_size]
                patches.append(patch.movedim(1, -1).flatten(1))
        return torch.stack(patches, dim=1)
    """),
    ("A1.1", "Tensor.unfold of both sides", """
        P = patch_size
        if any(side % P for side in images.shape[2:]):
            raise ValueError(f"{tuple(images.shape)}: not multiples of {P}")
        x = images.unfold(2, P, P).unfold(3, P, P)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    """),
    ("A1.1", "channels last first, one axis at a time, a view", """
        B, c, H, W = images.shape
        P = patch_size
        if H % P:
            raise ValueError("height: multiples")
        if W % P:
            raise ValueError("width: multiples")
        x = images.view(B, c, H // P, P, W // P, P)
        rows = x.movedim(1, -1).transpose(2, 3)
        return rows.reshape(B, -1, c * P ** 2)
    """),
    ("A1.2", "complex numbers", """
        half = x.shape[-1] // 2
        z = torch.complex(x[..., :half].float(), x[..., half:].float())
        turned = z * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
    """),
    ("A1.2", "x cos + (-b, a) sin", """
        half = x.shape[-1] // 2
        y = x.to(torch.float32)
        other = torch.cat((-y[..., half:], y[..., :half]), -1)
        return (y * torch.cat((cos, cos), -1) + other * torch.cat((sin, sin), -1)).type_as(x)
    """),
    ("A1.2", "a loop over pairs, promotion instead of casts", """
        half, out = x.shape[-1] // 2, []
        cos, sin = torch.broadcast_tensors(cos, sin)
        for i in range(half):
            out.append(x[..., i] * cos[..., i] - x[..., i + half] * sin[..., i])
        for i in range(half):
            out.append(x[..., i] * sin[..., i] + x[..., i + half] * cos[..., i])
        return torch.stack(out, dim=-1).to(x.dtype)
    """),
    ("A1.2", "matrices by einsum, autocast off", """
        with torch.autocast(x.device.type, enabled=False):
            matrix = torch.stack((torch.stack((cos, -sin)), torch.stack((sin, cos))))
            pairs = torch.stack(x.float().chunk(2, dim=-1))
            out = torch.einsum("rc...,c...->r...", matrix, pairs)
        return torch.cat((out[0], out[1]), dim=-1).to(x.dtype)
    """),
    ("A1.3", "a mesh of rows and columns", """
        device = self.freqs.device
        row, col = torch.meshgrid(torch.arange(grid[0], device=device), torch.arange(grid[1], device=device),
                                  indexing="ij")
        angle = torch.cat((col.reshape(-1, 1) * self.freqs, row.reshape(-1, 1) * self.freqs), dim=1)
        angle = torch.cat((angle, angle.new_zeros(others, angle.shape[1])))
        return torch.cos(angle), torch.sin(angle)
    """),
    ("A1.3", "a loop over places", """
        rows = []
        for n in range(grid[0] * grid[1]):
            rows.append(torch.cat((self.freqs * (n % grid[1]), self.freqs * (n // grid[1]))))
        rows += [torch.zeros_like(rows[0])] * others
        angle = torch.stack(rows)
        return angle.cos(), angle.sin()
    """),
    ("A1.3", "float32 for a module in bfloat16, too; divmod of floats", """
        n = torch.arange(grid[0] * grid[1] + others, device=self.freqs.device)
        row = torch.div(n, grid[1], rounding_mode="floor")
        place = torch.stack((n - row * grid[1], row), dim=1).float()
        place[grid[0] * grid[1]:] = 0
        angle = (place[:, :, None] * self.freqs.float()).flatten(1)
        return angle.cos(), angle.sin()
    """),
    ("A1.3", "an outer product of rows and of columns", """
        h, w = grid
        by = lambda count: torch.outer(torch.arange(count, device=self.freqs.device).float(), self.freqs)
        col, row = by(w)[None].expand(h, -1, -1), by(h)[:, None].expand(-1, w, -1)
        angle = torch.cat((col, row), dim=-1).reshape(h * w, -1)
        cos, sin = angle.cos(), angle.sin()
        return F.pad(cos, (0, 0, 0, others), value=1.0), F.pad(sin, (0, 0, 0, others))
    """),
    ("A1.4", "F.conv2d, a group per channel, autocast off", """
        C = images.shape[1]
        k = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=images.dtype, device=images.device)
        x = F.pad(images, (1, 1, 1, 1), mode="reflect")
        with torch.autocast(images.device.type, enabled=False):
            gx = F.conv2d(x, k.repeat(C, 1, 1, 1), groups=C)
            gy = F.conv2d(x, k.T.repeat(C, 1, 1, 1), groups=C)
        return gx, gy
    """),
    ("A1.4", "F.conv2d of channels as a batch, both kernels at once", """
        B, C, H, W = images.shape
        k = images.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
        x = F.pad(images, (1, 1, 1, 1), mode="reflect").reshape(B * C, 1, H + 2, W + 2)
        with torch.autocast(images.device.type, enabled=False):
            g = F.conv2d(x, torch.stack((k, k.t())).unsqueeze(1))
        return g[:, 0].reshape(B, C, H, W), g[:, 1].reshape(B, C, H, W)
    """),
    ("A1.4", "one axis smoothed, the other differenced", """
        x = torch.nn.functional.pad(images, [1, 1, 1, 1], "reflect")
        rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
        columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
        return rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]
    """),
    ("A1.4", "the other way round, then the sign", """
        H, W = images.shape[-2:]
        x = F.pad(images, (1, 1, 1, 1), mode="reflect")
        gx, gy = 0, 0
        for i, weight in ((2, 1), (1, 2), (0, 1)):
            gx = gx + weight * (x[..., i:i + H, 2:] - x[..., i:i + H, :-2])
            gy = gy + weight * (x[..., 2:, i:i + W] - x[..., :-2, i:i + W])
        return -gx, -gy
    """),
    ("A1.4", "without a graph: targets need no gradient", """
        with torch.no_grad():
            x = F.pad(images, (1, 1, 1, 1), mode="reflect")
            left, right = x[..., :-2], x[..., 2:]
            gx = (left - right)[..., :-2, :] + 2 * (left - right)[..., 1:-1, :] + (left - right)[..., 2:, :]
            above, below = x[..., :-2, :], x[..., 2:, :]
            gy = (above - below)[..., :-2] + 2 * (above - below)[..., 1:-1] + (above - below)[..., 2:]
        return gx, gy
    """),
    ("A1.4", "in float64, rounded at the end", """
        x = F.pad(images.double(), (1, 1, 1, 1), mode="reflect")
        patches = x.unfold(2, 3, 1).unfold(3, 3, 1)
        k = torch.tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]], device=x.device).double()
        return (patches * k).sum((-1, -2)).to(images.dtype), (patches * k.T).sum((-1, -2)).to(images.dtype)
    """),
    ("A1.5", "numpy in float64", """
        import numpy as np
        i = np.arange(2 * cell_size) - (2 * cell_size - 1) / 2
        w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * cell_size ** 2))
        return torch.tensor(w / w.sum(), dtype=torch.float32, device=device)
    """),
    ("A1.5", "a mesh and softmax", """
        i = torch.linspace(0.5 - cell_size, cell_size - 0.5, 2 * cell_size, device=device)
        square = i[:, None].square() + i.square()
        return (-square / (2 * cell_size ** 2)).flatten().softmax(0).reshape(2 * cell_size, -1)
    """),
    ("A1.6", "one bin after the other, cells by avg_pool2d", """
        H, W = images.shape[-2:]
        if H % patch_size or W % patch_size:
            raise ValueError(f"{H} x {W} cannot be cut into {patch_size}-px patches")
        hog_dim(patch_size, cell_size, bins)
        gx, gy = sobel(images.float())
        m = torch.sqrt(gx ** 2 + gy ** 2)
        m = torch.where(m > 1e-5, m, torch.zeros_like(m))
        number = torch.floor(torch.atan2(gx, gy) * bins / math.pi) % bins
        G = gaussian_window(cell_size, images.device)
        rows = torch.arange(H, device=images.device) % len(G)
        columns = torch.arange(W, device=images.device) % len(G)
        m = m * G[rows][:, columns]
        h = torch.stack([F.avg_pool2d(m * (number == k), cell_size) for k in range(bins)], 2) * cell_size ** 2
        h = F.normalize(h, dim=2)                                                # (B, 3, bins, H/c, W/c)
        B, side = len(images), patch_size // cell_size
        h = h.unfold(3, side, side).unfold(4, side, side)
        return h.permute(0, 3, 4, 1, 2, 5, 6).flatten(3).flatten(1, 2)
    """),
    ("A1.6", "one_hot and einsum, autocast off, angle modulo pi", """
        B, _, H, W = images.shape
        if H % patch_size or W % patch_size:
            raise ValueError("does not fit: 16-px patches")
        if cell_size < 1 or patch_size % cell_size:
            raise ValueError("cells do not fill the patch")
        c, side = cell_size, patch_size // cell_size
        with torch.autocast(images.device.type, enabled=False):
            gx, gy = sobel(images.float())
            m = torch.hypot(gx, gy)
            m = m * (m > 1e-5)
            number = (torch.atan2(gx, gy) % math.pi / math.pi * bins).floor().long() % bins
            window = gaussian_window(c, device=images.device)
            window = window.repeat(-(-H // (2 * c)), -(-W // (2 * c)))[:H, :W]
            weighted = (m * window)[..., None] * F.one_hot(number, bins)
            shape = (B, 3, H // patch_size, side, c, W // patch_size, side, c, bins)
            h = torch.einsum("bkiuxjvyn->bijknuv", weighted.reshape(shape))
            h = h / h.norm(dim=4, keepdim=True).clamp(min=1e-12)
        return h.reshape(B, -1, hog_dim(patch_size, cell_size, bins))
    """),
    ("A1.6", "bincount over all cells, gradients by its own convolution", """
        B, C, H, W = images.shape
        dim = hog_dim(patch_size, cell_size, bins)
        if H % patch_size or W % patch_size:
            raise ValueError("16-px patches")
        k = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]
            g = F.conv2d(x, torch.stack((k, k.T))[:, None]).reshape(B, C, 2, H, W)
        gx, gy = g[:, :, 0], g[:, :, 1]
        m = (gx * gx + gy * gy).sqrt()
        m = m.masked_fill(m <= 1e-5, 0)
        number = torch.remainder(torch.floor(torch.atan2(gx, gy) / math.pi * bins), bins).long()
        side = torch.arange(max(H, W), device=images.device)
        window = gaussian_window(cell_size, images.device)
        m = m * window[side[:H, None] % (2 * cell_size), side[None, :W] % (2 * cell_size)]
        h, w = H // cell_size, W // cell_size
        cell = side[:H, None] // cell_size * w + side[None, :W] // cell_size            # (H, W)
        start = torch.arange(B * C, device=images.device).reshape(B, C, 1, 1) * h * w
        place = (start + cell) * bins + number
        histogram = torch.bincount(place.flatten(), m.flatten(), B * C * h * w * bins)
        histogram = histogram.reshape(B, C, h, w, bins)
        norm = histogram.norm(dim=-1, keepdim=True)
        histogram = torch.where(norm > 0, histogram / norm, torch.zeros_like(histogram))
        s = patch_size // cell_size
        out = histogram.reshape(B, C, h // s, s, w // s, s, bins).permute(0, 2, 4, 1, 6, 3, 5)
        return out.reshape(B, (H // patch_size) * (W // patch_size), dim)
    """),
)
