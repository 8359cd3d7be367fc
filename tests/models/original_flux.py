"""The original FLUX blocks with UNO's LoRA, written from their equations, and their weights in diffusers' blocks.

Base weights and LoRA go by the original names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

D, HEADS, MLP = 64, 4, 256  # of the tiny FLUX
AXES = (4, 4, 8)


def base_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, inputs, outputs):
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    for i in range(2):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", D, 6 * D)
            linear(f"{block}_attn.qkv", D, 3 * D)
            linear(f"{block}_attn.proj", D, D)
            linear(f"{block}_mlp.0", D, MLP)
            linear(f"{block}_mlp.2", MLP, D)
            for which in ("query", "key"):
                weights[f"{block}_attn.norm.{which}_norm.scale"] = 1 + 0.3 * torch.randn(D // HEADS, generator=generator)
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", D, 3 * D)
        linear(f"{block}.linear1", D, 3 * D + MLP)
        linear(f"{block}.linear2", D + MLP, D)
        for which in ("query", "key"):
            weights[f"{block}.norm.{which}_norm.scale"] = 1 + 0.3 * torch.randn(D // HEADS, generator=generator)
    return weights


def rotations(ids):
    """Unit complex numbers [L, head dimension / 2], one per pair of neighbouring channels."""
    angles = [
        ids[:, axis, None].double() * 10000.0 ** (-torch.arange(0, size, 2).double() / size) for axis, size in enumerate(AXES)
    ]
    return torch.polar(torch.ones(1).double(), torch.cat(angles, dim=1))


class Original:
    """FLUX's double and single blocks with UNO's LoRA, in float64."""

    def __init__(self, weights, lora, rotation):
        self.w = {name: value.double() for name, value in weights.items()}
        self.lora = {name: value.double() for name, value in lora.items()}
        self.rotation = rotation

    def linear(self, x, name, lora=None):
        y = x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]
        return y if lora is None else y + self.update(x, lora)

    def update(self, x, lora):
        return x @ self.lora[f"{lora}.down.weight"].T @ self.lora[f"{lora}.up.weight"].T

    def modulation(self, vec, name):
        return (m[:, None] for m in self.linear(F.silu(vec), name).chunk(6 if "_mod" in name else 3, dim=-1))

    @staticmethod
    def modulated(x, shift, scale):
        return (1 + scale) * F.layer_norm(x, (D,), eps=1e-6) + shift

    def heads(self, qkv, norm):
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in qkv.split(D, dim=-1))  # [B, heads, L, d]
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.w[f"{norm}.{which}_norm.scale"]
            for x, which in ((q, "query"), (k, "key"))
        )
        return q, k, v

    def attention(self, q, k, v):
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.rotation).flatten(-2)
            for x in (q, k)
        )
        weights = (q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(-2)

    def double(self, i, img, txt, vec):
        block = f"double_blocks.{i}"
        streams = {}
        for name, x, number in (("txt", txt, 2), ("img", img, 1)):
            shift, scale, gate, *mlp = self.modulation(vec, f"{block}.{name}_mod.lin")
            x_in = self.modulated(x, shift, scale)
            qkv = self.linear(x_in, f"{block}.{name}_attn.qkv", f"{block}.processor.qkv_lora{number}")
            streams[name] = (x, gate, mlp, self.heads(qkv, f"{block}.{name}_attn.norm"), number)
        joint = (torch.cat([t, i], dim=2) for t, i in zip(streams["txt"][3], streams["img"][3], strict=True))
        attended = dict(zip(("txt", "img"), self.attention(*joint).split([txt.shape[1], img.shape[1]], dim=1), strict=True))
        out = {}
        for name, (x, gate, (shift, scale, mlp_gate), _, number) in streams.items():
            x = x + gate * self.linear(attended[name], f"{block}.{name}_attn.proj", f"{block}.processor.proj_lora{number}")
            hidden = F.gelu(self.linear(self.modulated(x, shift, scale), f"{block}.{name}_mlp.0"), approximate="tanh")
            out[name] = x + mlp_gate * self.linear(hidden, f"{block}.{name}_mlp.2")
        return out["img"], out["txt"]

    def single(self, i, x, vec):
        block = f"single_blocks.{i}"
        shift, scale, gate = self.modulation(vec, f"{block}.modulation.lin")
        x_in = self.modulated(x, shift, scale)
        qkv, mlp = self.linear(x_in, f"{block}.linear1").split([3 * D, MLP], dim=-1)
        qkv = qkv + self.update(x_in, f"{block}.processor.qkv_lora")
        attended = self.attention(*self.heads(qkv, f"{block}.norm"))
        both = torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1)
        return x + gate * self.linear(both, f"{block}.linear2", f"{block}.processor.proj_lora")

    def __call__(self, img, txt, vec):
        img, txt, vec = img.double(), txt.double(), vec.double()
        for i in range(2):
            img, txt = self.double(i, img, txt, vec)
        x = torch.cat([txt, img], dim=1)
        for i in range(2):
            x = self.single(i, x, vec)
        return x


def load_base(transformer, weights):
    """The original's weights in diffusers' blocks; strict loading shows that none is left out."""
    blocks = {kind: {} for kind in ("transformer_blocks", "single_transformer_blocks")}
    same = {
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
        "modulation.lin": "norm.linear", "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k",
    }  # fmt: skip
    split = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    for name, value in weights.items():
        kind, i, rest = name.split(".", 2)
        layer, end = rest.rsplit(".", 1)
        target = blocks["transformer_blocks" if kind == "double_blocks" else "single_transformer_blocks"]
        names = split.get(layer) or (same[layer],)
        sizes = [D, D, D, MLP][: len(names)] if len(names) > 1 else [len(value)]
        for new, part in zip(names, value.split(sizes), strict=True):
            target[f"{i}.{new}.{end.replace('scale', 'weight')}"] = part
    for kind, state in blocks.items():
        getattr(transformer, kind).load_state_dict(state, strict=True)


class Diffusers:
    """The same through diffusers' blocks."""

    def __init__(self, pipeline, ids):
        self.pipeline = pipeline
        self.rotary = pipeline.transformer.pos_embed(ids)

    @torch.no_grad()
    def __call__(self, img, txt, vec):
        transformer = self.pipeline.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=self.rotary)
        return torch.cat([txt, img], dim=1).double()
