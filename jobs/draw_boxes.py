"""Draw what a pseudo-label table says on its images, and how it came about.

    python jobs/draw_boxes.py --labels labels/ --output pictures/ --num-images 50

One picture per image: box, seed and mask as in the table; its maps (degree and similarity to the
seed; of a cut or a head the map of objects); its rule beside another; and contact_sheet.png. Where
the table's weights cannot be had: boxes, seeds and masks only.
"""

from pipeline.command_line import run_job
from pipeline.config import DrawJob


def main(job: DrawJob) -> int:
    """Run the job; imported late, so that --help and a typo do not wait for torch."""
    from pipeline.gallery.gallery import draw_gallery

    return draw_gallery(job)


if __name__ == "__main__":
    run_job(DrawJob, main, __doc__)
