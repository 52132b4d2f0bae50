"""Right answers to A2's blanks, written differently from the solution: no test may reject one of them.

RIGHT: (blank's id, how it differs, the function's body without its docstring).
"""
RIGHT = (
    ("A2.1", "choice without replacement, a mask per image", """
        if not (0 <= low and low <= high and high < 1):
            raise ValueError("mask ratios")
        rows = [torch.zeros(0, num_patches, dtype=torch.bool)]
        for rng in rngs:
            ratio = low + (high - low) * rng.random()
            count = math.ceil(ratio * num_patches - 1e-9)
            row = torch.zeros(1, num_patches, dtype=torch.bool)
            row[0, rng.choice(num_patches, count, replace=False)] = True
            rows.append(row)
        return torch.cat(rows)
    """),
    ("A2.1", "the smallest of random numbers", """
        if low < 0 or high >= 1 or low > high:
            raise ValueError("mask ratios outside 0 <= low <= high < 1")
        mask = torch.zeros(len(rngs), num_patches, dtype=torch.bool)
        for i, rng in enumerate(rngs):
            score, ratio = rng.random(num_patches), rng.uniform(low, high)
            order = np.argsort(score)
            mask[i, order[:-int(-(ratio * num_patches - 1e-9) // 1)].copy()] = True
        return mask
    """),
    ("A2.1", "a shuffled row", """
        if not 0 <= low <= high < 1:
            raise ValueError(f"mask ratios {low}, {high}")
        mask = np.empty((len(rngs), num_patches), dtype=bool)
        for i in range(len(rngs)):
            n = int(np.ceil(round(rngs[i].uniform(low, high) * num_patches, 9)))
            mask[i] = np.arange(num_patches) < n
            rngs[i].shuffle(mask[i])
        return torch.as_tensor(mask)
    """),
    ("A2.2", "overwritten where the mask is True", """
        x = self.patch_embed(patchify(images, self.patch_size))
        if mask is not None:
            x = x.clone()
            x[mask] = self.mask_token[0, 0].to(x.dtype)
        return x
    """),
    ("A2.2", "a weighted sum", """
        tokens = self.patch_embed(patchify(images, self.patch_size))
        if mask is None:
            return tokens
        m = mask.unsqueeze(-1).to(tokens.dtype)
        return m * self.mask_token.to(tokens.dtype) + (1 - m) * tokens
    """),
    ("A2.2", "F.unfold; torch.where with broadcast tokens", """
        P = self.patch_size
        columns = F.unfold(images, P, stride=P)                                 # (B, 3 P P, N)
        B, _, N = columns.shape
        patches = columns.reshape(B, 3, P * P, N).permute(0, 3, 2, 1).flatten(2)
        x = self.patch_embed(patches)
        if mask is None:
            return x
        return torch.where(mask.unsqueeze(2), self.mask_token.to(x).expand_as(x), x)
    """),
    ("A2.3", "split after the transformer, repeat for the batch", """
        rows, columns = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        tokens = self.image_tokens(images, mask)
        if not self.learnable_latents:
            return self.to_latent(self.transformer(tokens, (rows, columns)))
        z = (self.latent_tokens + self.latent_positions).repeat(len(images), 1, 1)
        out = self.transformer(torch.cat([tokens, z], 1), (rows, columns))
        _, latents = out.split([rows * columns, self.num_latents], dim=1)
        return self.to_latent(latents)
    """),
    ("A2.3", "to_latent of all tokens, then those that are read", """
        x = self.image_tokens(images, mask)
        N, grid = x.shape[1], [side // self.patch_size for side in images.shape[-2:]]
        if self.learnable_latents:
            batch = x.new_ones(len(x), 1, 1)
            z = batch * self.latent_tokens + batch * self.latent_positions
            x = torch.cat((x, z.to(x.dtype)), dim=-2)
        x = self.to_latent(self.transformer(x, tuple(grid)))
        return x[:, N:] if self.learnable_latents else x
    """),
    ("A2.4", "repeat, and a sum in front", """
        N = grid[0] * grid[1]
        image_tokens = self.image_token.repeat(latents.shape[0], N, 1)
        h = self.from_latent(latents)
        if not self.learnable_latents:
            return h + image_tokens
        return torch.cat([image_tokens.to(h.dtype), self.latent_positions + h], 1)
    """),
    ("A2.4", "broadcasting where it does", """
        h = self.from_latent(latents)
        if self.learnable_latents:
            B, D = len(latents), self.image_token.shape[-1]
            e = torch.broadcast_to(self.image_token, (B, math.prod(grid), D))
            return torch.hstack((e, h + self.latent_positions))
        return self.image_token + h
    """),
    ("A2.5", "narrow", """
        x = self.tokens(latents, grid)
        return self.transformer(x, grid).narrow(1, 0, grid[0] * grid[1])
    """),
    ("A2.5", "split by the number of latents", """
        x = self.transformer(self.tokens(latents, grid), grid)
        behind = latents.shape[1] if self.learnable_latents else 0
        return x[:, :x.shape[1] - behind]
    """),
    ("A2.6", "a loop, and pixels by fold", """
        P, (rows, columns) = self.config.patch_size, grid
        aux = {}
        for name in self.aux_decoders:
            aux[name] = self.aux_decoders[name](h, grid)
        x = self.decoder(h, grid).unflatten(2, (P * P, 3)).transpose(2, 3).flatten(2)
        pixels = F.fold(x.transpose(1, 2), (rows * P, columns * P), P, stride=P)
        return MAETokOutput(pixels, h, aux, posterior)
    """),
    ("A2.6", "by keywords", """
        patches = self.decoder.head(self.decoder.image_tokens(h, grid))
        pixels = unpatchify(patches, self.config.patch_size, grid)
        aux = dict(zip(self.aux_decoders.keys(), (d(h, grid) for d in self.aux_decoders.values())))
        return MAETokOutput(reconstruction=pixels, latents=h, aux=aux, posterior=posterior)
    """),
    ("A2.7", "slices, and the root of the variance", """
        h = self.encoder(images, mask)
        if self.config.variational:
            C = self.config.latent_dim
            mean, logvar = h[..., :C], torch.clamp(h[..., C:], min=-30, max=20)
            posterior = torch.cat([mean, logvar], -1)
            if noise is not None:
                mean = mean + torch.sqrt(torch.exp(logvar)) * noise
            return mean, posterior
        return h, None
    """),
    ("A2.7", "addcmul, split", """
        out = self.encoder(images, mask)
        posterior = None
        if self.config.variational:
            mean, logvar = out.split(self.config.latent_dim, dim=2)
            logvar = logvar.minimum(logvar.new_tensor(20.0)).maximum(logvar.new_tensor(-30.0))
            posterior, out = torch.cat((mean, logvar), 2), mean
            if noise is not None:
                out = torch.addcmul(mean, torch.exp(logvar / 2), noise)
        return out, posterior
    """),
    ("A2.8", "a loop over images", """
        prediction, target = prediction.float(), target.float()
        total = prediction.sum() * 0
        for p, t, m in zip(prediction, target, mask):
            if m.any():
                total = total + (p[m] - t[m]).pow(2).mean()
        return total / len(prediction)
    """),
    ("A2.8", "where, then one division", """
        error = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(2)
        error = torch.where(mask, error, torch.zeros_like(error))
        count = torch.maximum(mask.sum(dim=1), torch.ones_like(mask.sum(dim=1)))
        return torch.mean(error.sum(dim=1) / count)
    """),
    ("A2.8", "einsum, autocast off, the target detached", """
        with torch.autocast(prediction.device.type, enabled=False):
            difference = (prediction.float() - target.detach().float()) * mask.unsqueeze(-1)
            squares = torch.einsum("bnd,bnd->b", difference, difference) / prediction.shape[-1]
            return (squares / mask.sum(-1).clamp_min(1)).mean()
    """),
    ("A2.9", "the two one after the other, an upper bound alone", """
        first = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
        second = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]
        first, second = all_mean(first), all_mean(second)
        ratio = torch.linalg.vector_norm(first) / (torch.linalg.vector_norm(second) + 1e-4)
        return torch.clamp(ratio, max=1e4).detach()
    """),
    ("A2.9", "roots of sums of squares, without a graph", """
        grad = lambda loss: all_mean(torch.autograd.grad(loss, [last_layer], retain_graph=True)[0])
        a, b = grad(reconstruction_loss), grad(adversarial_loss)
        with torch.no_grad():
            ratio = a.square().sum().sqrt() / (1e-4 + b.square().sum().sqrt())
            return torch.where(ratio > 1e4, torch.full_like(ratio, 1e4), ratio)
    """),
    ("A2.9", "both gradients averaged at once", """
        both = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                            for loss in (reconstruction_loss, adversarial_loss)])
        norms = all_mean(both).flatten(1).norm(dim=1)
        return (norms[0] / (norms[1] + 0.0001)).detach().clamp(0, 10_000)
    """),
    ("A2.10", "the networks called as they are", """
        c, x = self.config, output.reconstruction.float()
        terms = {}
        terms["recon"] = (x - batch.images).square().mean()
        loss = terms["recon"]
        if self.lpips is not None:
            terms["percep"] = self.lpips(x, batch.images).mean()
            loss = loss + c.percep_weight * min(1, step / PERCEP_WARMUP) * terms["percep"]
        if batch.windows is not None:
            self.adversary.requires_grad_(False)
            with autocast(c.dtype, self.device, c.width):
                logits = self.adversary.logits(x, batch.windows[2])
                terms["adv"] = generator_loss(logits)
            weight = adaptive_weight(loss, terms["adv"], model.decoder.head.weight)
            terms["adaptive_weight"] = weight
            loss = loss + c.disc_weight * weight * terms["adv"]
        for name in batch.targets:
            mask = batch.mask if c.mask_high else batch.mask | True
            terms[name] = self.targets[name].loss(output.aux[name], batch.targets[name], mask)
            loss = loss + self.targets[name].weight * terms[name]
        if batch.noise is not None:
            terms["kl"] = kl_divergence(output.posterior)
            loss = loss + c.kl_weight * terms["kl"]
        return loss, terms
    """),
    ("A2.10", "terms first, then their weighted sum", """
        config = self.config
        x, images = output.reconstruction.to(torch.float32), batch.images
        terms, weights = {"recon": F.mse_loss(x, images)}, {"recon": 1.0}
        total = lambda: sum(weights[name] * terms[name] for name in weights)
        if self.lpips is not None:
            terms["percep"] = self.lpips(x, images).mean()
            weights["percep"] = config.percep_weight * min(step, PERCEP_WARMUP) / PERCEP_WARMUP
        if batch.windows:
            for p in self.adversary.parameters():
                p.requires_grad_(False)
            with autocast(config.dtype, self.device, config.width):
                terms["adv"] = generator_loss(self.adversary.logits(x, batch.windows[-1]))
            terms["adaptive_weight"] = adaptive_weight(total(), terms["adv"], model.decoder.head.weight)
            weights["adv"] = config.disc_weight * terms["adaptive_weight"]
        mask = torch.ones_like(batch.mask) if config.mask_high == 0 else batch.mask
        for name, y in batch.targets.items():
            target = self.targets[name]
            terms[name], weights[name] = target.loss(output.aux[name], y, mask), target.weight
        if batch.noise is not None:
            terms["kl"], weights["kl"] = kl_divergence(output.posterior), config.kl_weight
        return total(), terms
    """),
    ("A2.10", "the discriminator's parameters left as they are, no gradient goes to them", """
        config, images, reconstruction = self.config, batch.images, output.reconstruction.float()
        terms = {"recon": F.mse_loss(reconstruction, images)}
        loss = terms["recon"]
        if self.lpips is not None:
            terms["percep"] = self.lpips(reconstruction, images).mean()
            loss = loss + config.percep_weight * min(1.0, step / PERCEP_WARMUP) * terms["percep"]
        if batch.windows:
            with autocast(config.dtype, self.device, config.width):
                terms["adv"] = differentiated(
                    lambda x: generator_loss(self.adversary.logits(x, batch.windows[-1])), reconstruction)
            terms["adaptive_weight"] = adaptive_weight(loss, terms["adv"], model.decoder.head.weight)
            loss = loss + config.disc_weight * terms["adaptive_weight"] * terms["adv"]
        mask = batch.mask if config.mask_high > 0 else torch.ones_like(batch.mask)
        for name, y in batch.targets.items():
            terms[name] = self.targets[name].loss(output.aux[name], y, mask)
        loss = loss + sum(self.targets[name].weight * terms[name] for name in batch.targets)
        if batch.noise is not None:
            terms["kl"] = kl_divergence(output.posterior)
            loss = loss + config.kl_weight * terms["kl"]
        return loss, terms
    """),
    ("A2.11", "by the stage's own steps", """
        config = self.config
        if stage.number == 2:
            s, S = step - stage.first, stage.end - stage.first
            share = min(1, s / max(1, config.stage2_ramp * S - 1))
            return (config.mask_high * (1 - share),) * 2
        return config.mask_low, config.mask_high
    """),
    ("A2.11", "np.interp, steps counted from the config's stage 1", """
        c = self.config
        if stage.number == 1:
            return (c.mask_low, c.mask_high)
        end = max(1, c.stage2_ramp * c.stage2_steps - 1)
        ratio = float(np.interp(step - c.steps, [0, end], [c.mask_high, 0]))
        return ratio, ratio
    """),
)
