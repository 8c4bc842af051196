"""Stage one: extracts teacher, mask, latent and text stores from a video dataset.

    run               checks the settings, then runs one model after the other
    kinds             the extractions of a configuration
    text, latents     extractions with the base model's text encoder and VAE
    teacher/          tracking in both directions with SAM2, fusion, stored arrays
    prompts/          prompts for SAM2: the dataset's, Grounding DINO's, or the moving subject
    execution/        jobs, threads, processes, Ray; comparison with the dataset
    fingerprints      inputs of each clip; summary: results of a run, and failures.jsonl
    derive            Gram flow from stored features

Nothing is imported here, so that importing the configuration does not load SAM2.
"""
