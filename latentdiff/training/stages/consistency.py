"""Consistency distillation: a student that does in one evaluation what its teacher does in many guided ones.

The noise levels of a DDIM walk of the teacher are cut into segments. From any of them the student learns to reach the clean
end of its segment in one step: wherever on the teacher's path it starts, it has to arrive at the same place. So it is told
to arrive, from a noisy latent, where it arrives itself from k guided steps of the teacher further on:

    loss = d(f(x_n, s), f(x_(n-k), s))        x_(n-k) = k DDIM steps of the guided teacher from x_n, as far as s

with f(x, s) a DDIM step of the student to the end s of the segment. With one segment, this is a latent consistency model
(Luo et al. 2023, algorithm 1; Song et al. 2023); with several, a multistep one (Heek et al. 2024, "Multistep Consistency
Models"), whose walk has no fresh noise, so that it ends in the teacher's image. The boundary condition f(x_s, s) = x_s needs
no scaling, as a DDIM step of no length is the identity; the scalings of Luo et al. are 0 and 1 at all of these levels to
within 1e-5. The target is the student's own answer without gradient (Song & Dhariwal 2023, section 3.2: averages of the
weights there gain nothing). With k as long as a segment, the teacher itself walks to its end (Salimans & Ho 2022, Meng et al.
2023, in one go): each target costs more, and is right from the first step on.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.diffusion.parameterization import parameterization
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import ConfigError
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.unet import UNet
from latentdiff.training.loss import encode_tokens


class ConsistencyLoss(nn.Module):
    """A U-Net as the teacher, the same with a LoRA as the student, and the loss between them.

    Places are numbers of noise levels, 0 to `teacher_steps`: 0 is the clean end, others rise evenly in timesteps.

    Args:
        unet, text_encoder: the model, frozen.
        lora: what is trained.
        schedule: noise schedule of the model.
        empty: token ids (1, L) of what guidance leads away from.
        guidance_scale: of the teacher.
        teacher_steps: how many steps its walk has.
        segments: how many the student's walk has.
        teacher_span: how many of the teacher's are in a target.
        huber_c: of the pseudo-Huber distance: errors far above it count linearly.

    Raises:
        ConfigError: the numbers of steps do not divide one another.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    empty: Tensor

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder,
        lora: LoRA,
        schedule: Schedule,
        empty: Tensor,
        *,
        guidance_scale: float,
        teacher_steps: int,
        segments: int,
        teacher_span: int,
        huber_c: float,
    ) -> None:
        super().__init__()
        total = schedule.num_train_timesteps
        if total % teacher_steps or teacher_steps % segments:
            raise ConfigError(
                f"teacher_steps must divide the {total} timesteps, and segments the teacher_steps; found {teacher_steps} and"
                f" {segments}"
            )
        self.unet, self.text_encoder, self.lora = unet, text_encoder, lora
        self.guidance_scale, self.teacher_span, self.huber_c = guidance_scale, teacher_span, huber_c
        self.stride, self.length = total // teacher_steps, teacher_steps // segments
        self._parameterization = parameterization(schedule.config.prediction_type)
        visited = torch.arange(self.stride - 1, total, self.stride)
        clean = torch.tensor([schedule.clean.alpha_cumprod], dtype=torch.float64)
        signal = torch.cat([clean, schedule.alphas_cumprod[visited]])  # by place
        self.register_buffer("alpha", signal.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - signal).sqrt().float(), persistent=False)
        self.register_buffer("timesteps", torch.cat([torch.zeros_like(visited[:1]), visited]), persistent=False)
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The loss, and the mean squared error behind it.

        Args:
            batch: `latents` and `noise` (n, C, h, w), `timesteps` (n,), `weights` (n,), `tokens` (n, chunks, L).
        """
        place = batch["timesteps"] // self.stride + 1
        alpha, sigma = self._levels(place)
        x = alpha * batch["latents"] + sigma * batch["noise"]
        context, empty = self.texts(batch["tokens"])
        end = (place - 1) // self.length * self.length
        target = self._target(x, place, end, context, empty)
        with self.lora.attached():
            difference = self.jump(x, place, end, context) - target
        cost = (difference.square() + self.huber_c**2).sqrt() - self.huber_c  # pseudo-Huber, Song & Dhariwal 2023
        return {"loss": (batch["weights"] * cost.flatten(1).mean(1)).mean(), "mse": difference.detach().square().mean()}

    @torch.no_grad()
    def _target(self, x: Tensor, place: Tensor, end: Tensor, context: Tensor, empty: Tensor) -> Tensor:
        """Where the student should arrive: the teacher's steps, and from there what it says itself."""
        x, place = x.clone(), place.clone()
        for _ in range(self.teacher_span):
            going = (place > end).nonzero().flatten()
            if len(going):
                x[going] = self.teacher_step(x[going], place[going], context[going], empty[going])
                place[going] -= 1
        going = (place > end).nonzero().flatten()
        if len(going):
            with self.lora.attached():
                x[going] = self.jump(x[going], place[going], end[going], context[going])
        return x

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (n, chunks L, width) of token ids (n, chunks, L), and as many of the empty caption."""
        dtype = self.unet.conv_in.weight.dtype
        context = encode_tokens(self.text_encoder, tokens).to(dtype)
        empty = encode_tokens(self.text_encoder, self.empty.expand(tokens.shape[1], -1)[None]).to(dtype)
        return context, empty.expand_as(context)

    def teacher_step(self, x: Tensor, place: Tensor, context: Tensor, empty: Tensor) -> Tensor:
        """Latents x (n, C, h, w) at their places (n,), one guided DDIM step further on."""
        raw = self._raw(torch.cat([x, x]), torch.cat([place, place]), torch.cat([empty, context]))
        negative, positive = raw.chunk(2)
        return self._step(negative + self.guidance_scale * (positive - negative), x, place, place - 1)

    def jump(self, x: Tensor, place: Tensor, end: Tensor, context: Tensor) -> Tensor:
        """Latents x (n, C, h, w) at their places (n,), one unguided DDIM step later, at the places `end` (n,)."""
        return self._step(self._raw(x, place, context), x, place, end)

    @torch.no_grad()
    def walk(self, noise: Tensor, tokens: Tensor, *, student: bool) -> Tensor:
        """From noise (n, C, h, w) to clean latents, by the student in few steps or by its teacher in all."""
        context, empty = self.texts(tokens)
        stride = self.length if student else 1
        x = noise
        with self.lora.attached() if student else nullcontext():
            for first in range(len(self.alpha) - 1, 0, -stride):
                place = torch.full((len(x),), first, device=x.device)
                step = self.jump(x, place, place - stride, context) if student else None
                x = self.teacher_step(x, place, context, empty) if step is None else step
        return x

    def _raw(self, x: Tensor, place: Tensor, context: Tensor) -> Tensor:
        x = x.to(self.unet.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(x, self.timesteps[place], context).float()

    def _step(self, raw: Tensor, x: Tensor, place: Tensor, end: Tensor) -> Tensor:
        """The DDIM step (Song et al. 2021, eq. 12 without noise) from place to end."""
        (alpha, sigma), (alpha_end, sigma_end) = self._levels(place), self._levels(end)
        says = self._parameterization
        return alpha_end * says.x0(raw, x, alpha, sigma) + sigma_end * says.eps(raw, x, alpha, sigma)

    def _levels(self, place: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return self.alpha[place].view(shape), self.sigma[place].view(shape)
