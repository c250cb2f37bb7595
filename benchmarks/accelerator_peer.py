"""Time the training step of diffusers' U-Net under PyTorch on a GPU, to set beside `benchmarks.accelerator`.

    pip install torch diffusers
    python -m benchmarks.accelerator_peer BATCH

Channels last, compiled or not, in bfloat16 or TF32. The widths and depth are those of the published DDPM++; its blocks
are others, so that FLOP/s compare and seconds do not. Prints markdown.
"""

import sys
import time

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode


def main(batch: int):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=4,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    model = model.cuda().to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.randn(batch, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    z, t = torch.randn_like(x), torch.rand(batch, device="cuda") * 999

    def step(network, bfloat16):
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=bfloat16):
            loss = (network(x, t).sample - z).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    with FlopCounterMode(display=False) as counter:
        step(model, False)
    flops = counter.get_total_flops() / batch
    compiled = torch.compile(model)
    ways = {"training step, bfloat16, compiled": (compiled, True), "training step, TF32, compiled": (compiled, False)}
    ways["training step, bfloat16, not compiled"] = (model, True)
    for network, bfloat16 in ways.values():
        for _ in range(3):
            step(network, bfloat16)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.cuda.get_device_name()}, batch {batch}\n"
    )
    print("| | images/s | GFLOP an image | TFLOP/s |\n|---|---|---|---|")
    for name, (network, bfloat16) in ways.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for _ in range(5):
                step(network, bfloat16)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / 5)
        rate = batch / sorted(times)[1]
        print(f"| {name} | {rate:.0f} | {flops / 1e9:.1f} | {rate * flops / 1e12:.1f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
