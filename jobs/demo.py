"""See it work: sample scenes -> pseudo boxes -> CorLoc -> pictures, with the commands it runs.

make demo                       # offline, with the small DINO ViT of this repository
make demo WEIGHTS=FILE          # with any other ViT's weights
"""

import subprocess
import sys
from pathlib import Path

from pipeline.command_line import run_job
from pipeline.config import DemoJob

SHIPPED = ["--backbone.name", "vit_nano_patch8.dino", "--decode.max-side", "224"]


def backbone_flags(weights: str | None) -> list[str]:
    """The shipped network, or the one of the file, with the feature that suits it."""
    from pipeline.models.checkpoints import read_state_dict, recognise_vit
    from pipeline.models.exported_backbone import name_beside

    if weights is None:
        return [*SHIPPED, "--backbone.feature", "value", "--backbone.block", "3"]
    if name_beside(Path(weights)):
        return ["--backbone.checkpoint", weights]
    name, labelled = recognise_vit(read_state_dict(Path(weights)), weights)
    flags = ["--backbone.name", name, "--backbone.checkpoint", weights]
    middle = "--backbone.feature value --backbone.block 5 --backbone.normalize half"
    return flags + (middle.split() if labelled else [])


def main(job: DemoJob) -> int:
    """Run the four steps; stop at the first that fails, with its exit code."""
    from pipeline.scenes.scenes import write_collection

    scenes, labels, pictures = (f"{job.output}/{name}" for name in ("scenes", "labels", "pictures"))
    again = ["--overwrite", *backbone_flags(job.weights)]
    truth = Path(scenes) / "instances.json"
    if not truth.exists():
        print(f"Making {job.num_scenes} scenes with exact boxes in {scenes}", flush=True)
        write_collection(Path(scenes), num_scenes=job.num_scenes, seed=job.seed)
    steps = [
        ["label_images", "--images", f"{scenes}/images", "--output", labels, *again],
        ["evaluate_boxes", "--labels", labels, "--ground-truth", str(truth)],
        ["draw_boxes", "--labels", labels, "--output", pictures, "--num-images", "12"],
    ]
    for name, *flags in steps:
        command = [f"jobs/{name}.py", *flags]
        print("\n$ python " + " ".join(command), flush=True)
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            print(f"{name} ended with code {code}")
            return code
    print(f"\nThe table:     {labels}\nThe pictures:  {pictures}/contact_sheet.png")
    print("The run:       .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db")
    return 0


if __name__ == "__main__":
    run_job(DemoJob, main, __doc__)
