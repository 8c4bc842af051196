"""Stage one: a video dataset in, teacher, masks, latents and text stores out; `extract` runs it.

    extract           the run: checks everything, then one model after the other
    make_extractions  what is computed: text, latents, and subjects/ (teacher and masks in one pass)
    work/             how the shards get done: jobs, threads, processes, Ray, failures
    subjects/         which passes follow a clip's subjects, and what is stored of them
    prompts/          what the passes set out from: the dataset, Grounding DINO, the picture itself
    tracking/         SAM2 frame by frame; its loader is the one file that imports sam2
    estimates/        what all of it would take, before it starts

Nothing is imported here: the configuration of stage one is read by commands that must not load
SAM2.
"""
