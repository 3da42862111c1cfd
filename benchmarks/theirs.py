"""The same step in plain PyTorch on timm's model, as its users write it.

eager      float32, as the authors' code does it: the clean pass of TRADES is computed anew in each
           attack step and twice in the update, ARD multiplies gradients by 0 or 1
compiled   torch.compile and bfloat16 autocast, as a strong user would: TRADES' clean pass once, the
           rest alike
graphs     the same with CUDA graphs (``mode="reduce-overhead"``); GPUs only

All freeze the parameters during the attack. Compiled code needs that: its backward pass computes
the gradient of every parameter that requires one. Eager code is as fast without it in training,
where the authors call ``torch.autograd.grad(loss, delta)``, which computes no other gradient. Their
evaluation calls ``loss.backward()`` with trainable parameters, and is slower than ``eager`` here.

All use timm's fused attention and keep batches on the device. On a GPU, float32 is float32 proper,
or TF32 if the case says so; the same holds for us.
"""

from collections.abc import Callable

import numpy as np
import timm
import torch
import torch.nn.functional as F
from common import CLASSES, EPS, STEP_SIZE, Case

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
BETA = 6.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Gate(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a scalar."""

    @staticmethod
    def forward(ctx, x, keep):
        ctx.save_for_backward(keep)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        (keep,) = ctx.saved_tensors
        return gradient * keep, None


class Classifier(torch.nn.Module):
    """Pixels to logits; ``keep`` [blocks] scales the gradient through each attention."""

    def __init__(self, case: Case):
        super().__init__()
        options = {"drop_path_rate": 0.1} if case.model.startswith("swin") else {}
        if case.depth:
            options["depth"] = case.depth
        self.net = timm.create_model(
            case.model,
            pretrained=False,
            num_classes=CLASSES,
            img_size=case.image_size,
            patch_size=case.patch_size,
            **options,
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.keep = None
        attentions = [m for n, m in self.net.named_modules() if n.endswith(".attn")]
        self.blocks = len(attentions)
        for index, attention in enumerate(attentions):
            attention.register_forward_hook(self._gate(index))

    def _gate(self, index):
        def hook(module, inputs, output):
            return output if self.keep is None else _Gate.apply(output, self.keep[index])

        return hook

    def forward(self, x, keep=None):
        self.keep = keep
        return self.net((x - self.mean) / self.std)


def _kl(clean, adversarial):
    return F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")


def _mart(clean, adversarial, labels):
    p_clean, p_adv = F.softmax(clean, 1), F.softmax(adversarial, 1)
    others = p_adv.scatter(1, labels[:, None], -1.0)
    boosted = F.cross_entropy(adversarial, labels)
    boosted = boosted - torch.log(1.0001 - others.max(1).values + 1e-12).mean()
    kl = (p_clean * (torch.log(p_clean + 1e-12) - torch.log(p_adv + 1e-12))).sum(1)
    p_label = p_clean.gather(1, labels[:, None])[:, 0]
    return boosted + BETA * (kl * (1.0000001 - p_label)).mean()


class Step:
    """One training step, or one PGD evaluation, of a case."""

    def __init__(self, case: Case, subject: str):
        self.case, self.compiled = case, subject != "eager"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, 3, case.image_size, case.image_size)
        self.images = torch.rand(shape, generator=generator).to(DEVICE)
        self.labels = torch.randint(0, CLASSES, (case.batch,), generator=generator).to(DEVICE)
        self.model = Classifier(case).to(DEVICE)
        self.apply = self.model
        if self.compiled:
            mode = "reduce-overhead" if subject == "graphs" else None
            self.apply = torch.compile(self.model, mode=mode)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4
        )
        if case.objective == "pgd":
            self.model.eval()
            with torch.no_grad():
                self.labels = self.model(self.images).argmax(1)

    def logits(self, x, keep=None):
        """Logits in float32: of a CUDA graph, a copy, which the next replay does not overwrite."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.compiled):
            return self.apply(x, keep).float()

    def attack(self):
        case, x, y = self.case, self.images, self.labels
        tiny = 1e-5 if case.objective == "pgd" else 1.0
        eps, step_size = EPS * tiny, STEP_SIZE * tiny
        self.model.eval().requires_grad_(False)
        if case.objective in ("trades", "mart"):
            delta = 0.001 * torch.randn_like(x)
        else:
            delta = torch.empty_like(x).uniform_(-eps, eps)
        delta = torch.clamp(delta, -x, 1 - x)
        clean = None
        if case.objective == "trades" and self.compiled:
            with torch.no_grad():
                clean = self.logits(x)
        for _ in range(case.steps):
            delta, keep = self._masks(delta)
            delta = delta.detach().requires_grad_()
            logits = self.logits(x + delta, keep)
            if case.objective == "trades":
                reference = self.logits(x) if clean is None else clean
                loss = F.kl_div(F.log_softmax(logits, 1), F.softmax(reference, 1), reduction="sum")
            else:
                loss = F.cross_entropy(logits, y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            moved = torch.clamp(delta + step_size * gradient.sign(), -eps, eps)
            moved = torch.clamp(moved, -x, 1 - x).detach()
            if case.objective == "pgd":
                correct = (logits.argmax(1) == y)[:, None, None, None]
                moved = torch.where(correct, moved, delta.detach())
            delta = moved
        return (x + delta).detach()

    def _masks(self, delta):
        case = self.case
        if not case.masked:
            return delta, None
        grid = case.image_size // (16 if case.image_size == 224 else case.patch_size)
        side = case.image_size // grid
        kept = torch.rand(grid * grid, device=DEVICE).argsort() < int(grid * grid * case.keep)
        mask = kept.view(grid, grid).float()
        mask = mask.repeat_interleave(side, 0).repeat_interleave(side, 1)
        keep = (torch.rand(self.model.blocks, device=DEVICE) < case.keep).float()
        return delta * mask, keep

    def update(self, adversarial):
        objective, x, y = self.case.objective, self.images, self.labels
        self.model.train().requires_grad_(True)
        if objective == "at":
            loss = F.cross_entropy(self.logits(adversarial), y)
        else:
            clean, adv = self.logits(x), self.logits(adversarial)
            if objective == "mart":
                loss = _mart(clean, adv, y)
            else:
                natural = clean if self.compiled else self.logits(x)
                loss = F.cross_entropy(natural, y) + BETA * _kl(clean, adv)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def run(self):
        adversarial = self.attack()
        if self.case.objective == "pgd":
            with torch.no_grad():
                (self.logits(adversarial).argmax(1) == self.labels).cpu()
        else:
            self.update(adversarial)
        if DEVICE == "cuda":
            torch.cuda.synchronize()


def runner(case: Case, subject: str) -> Callable[[], None]:
    """What does the case once, and waits for its end, each time it is called."""
    return Step(case, subject).run


def logits_with(case: Case, state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """[n, classes] of timm's model with these weights on images [n, H, W, C] in [0, 1]."""
    model = Classifier(case).eval()
    model.net.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.no_grad():
        return model(torch.tensor(np.moveaxis(images, -1, 1).copy())).numpy()


def memory_peak() -> int | None:
    """Bytes of GPU memory at most in use so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
