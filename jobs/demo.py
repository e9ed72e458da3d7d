"""See it work: sample scenes -> pseudo boxes -> CorLoc -> pictures, with the commands it runs.

make demo                       # offline, with the small DINO ViT of this repository
make demo WEIGHTS=FILE          # with any other ViT's weights

SoLOST boxes the scenes, then a head that is fitted on them without labels; the same head then boxes
three photos that come with packages this one needs.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.command_line import run_job
from pipeline.config import DemoJob

SHIPPED = ["--backbone.name", "vit_nano_patch8.dino", "--decode.max-side", "224"]

PHOTOS = {
    "sklearn/datasets/images/china.jpg": "CC BY 2.0, danielbuechele, comes with scikit-learn",
    "sklearn/datasets/images/flower.jpg": "CC BY 2.0, vultilion (Flickr), comes with scikit-learn",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg": "US Navy, public domain, with matplotlib",
}
"""By where they lie among installed packages; whose they are."""


def backbone_flags(weights: str | None) -> list[str]:
    """The shipped network, or the one of the file."""
    from pipeline.models.checkpoints import read_state_dict, recognise_vit
    from pipeline.models.exported_backbone import name_beside

    if weights is None:
        return SHIPPED
    if name_beside(Path(weights)):
        return ["--backbone.checkpoint", weights]
    name, labelled = recognise_vit(read_state_dict(Path(weights)), weights)
    # A name's recipe is that of what timm publishes under it.
    name = name if labelled else f"{name}.dino"
    return ["--backbone.name", name, "--backbone.checkpoint", weights]


def gather_photos(folder: Path) -> None:
    """Copy the photos out of the installed packages, and say whose they are."""
    import sklearn

    packages = Path(sklearn.__file__).parents[1]
    folder.mkdir(parents=True, exist_ok=True)
    for place, whose in PHOTOS.items():
        shutil.copy(packages / place, folder)
        print(f"  {Path(place).name}: {whose}", flush=True)


def main(job: DemoJob) -> int:
    """Run the steps; stop at the first that fails, with its exit code."""
    from pipeline.scenes.scenes import write_collection

    place = {name: f"{job.output}/{name}" for name in ("scenes", "photos", "solost", "head")}
    pictures = f"{job.output}/pictures"
    again = ["--overwrite", *backbone_flags(job.weights)]
    truth = Path(place["scenes"]) / "instances.json"
    if not truth.exists():
        print(f"Making {job.num_scenes} scenes with exact boxes in {place['scenes']}", flush=True)
        write_collection(Path(place["scenes"]), num_scenes=job.num_scenes, seed=job.seed)
    scenes = ["--images", f"{place['scenes']}/images"]
    with_head = ["--localization.rule", "head"]
    steps = [
        ["label_images", *scenes, "--output", place["solost"], *again],
        ["evaluate_boxes", "--labels", place["solost"], "--ground-truth", str(truth)],
        ["label_images", *scenes, "--output", place["head"], *with_head, *again],
        ["evaluate_boxes", "--labels", place["head"], "--ground-truth", str(truth)],
        ["draw_boxes", "--labels", place["head"], "--output", pictures, "--num-images", "12"],
    ]
    code = _run(steps)
    head = f"{place['head']}/_head"
    if code or not Path(head, "config.json").exists():
        return code
    print("\nThree photos, with the head that was fitted on the scenes:", flush=True)
    if job.weights is None:
        print("  (expect little: the small network is for trying things, not for photos)")
    gather_photos(Path(place["photos"]))
    labels = f"{job.output}/photo-labels"
    with_head += ["--localization.head", head, "--compute.num-actors", "0"]
    steps = [
        ["label_images", "--images", place["photos"], "--output", labels, *with_head, *again],
        ["draw_boxes", "--labels", labels, "--output", f"{job.output}/photo-pictures"],
    ]
    code = _run(steps)
    if not code:
        print(f"\nThe tables:    {place['solost']}, {place['head']}, {labels}")
        print(f"The pictures:  {pictures}/contact_sheet.png; of each image the head beside SoLOST")
        print("The runs:      .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db")
    return code


def _run(steps: list[list[str]]) -> int:
    for name, *flags in steps:
        command = [f"jobs/{name}.py", *flags]
        print("\n$ python " + " ".join(command), flush=True)
        code = subprocess.run([sys.executable, *command], check=False).returncode
        if code:
            print(f"{name} ended with code {code}")
            return code
    return 0


if __name__ == "__main__":
    run_job(DemoJob, main, __doc__)
