"""Train a vision transformer on images without labels: DINO, on Ray Train.

    python jobs/pretrain_dino.py --images photos/ --model.name vit_small_patch16_224 --output OUT
    python jobs/pretrain_dino.py --images photos/ --init vit_small_patch16_224.dino --output OUT
    python jobs/pretrain_dino.py --preset nano --images photos/ --output OUT   # on a laptop
    python jobs/pretrain_dino.py ... --num-workers 8 --use-gpu                   # or under torchrun

The same command goes on with a run that was stopped. OUT/teacher.safetensors is what
jobs/label_images.py and jobs/train_classifier.py take.
"""

from pipeline.command_line import run_job
from pipeline.config import PretrainDinoJob
from pipeline.config.pretraining import presets


def main(job: PretrainDinoJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch and Ray."""
    from pipeline.cluster.training import pretrain_dino

    return pretrain_dino(job)


if __name__ == "__main__":
    run_job(PretrainDinoJob, main, __doc__, presets())
