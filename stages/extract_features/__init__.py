"""Stage one: a video dataset in; teacher, mask, latent and text stores out.

    run               checks everything, then runs one model after the other
    kinds             what is computed, from the configuration
    text, latents     the extractions of the base model's parts
    teacher/          both directions of SAM2, their fusion, and what is stored of them
    prompts/          what is tracked: the dataset's prompts, Grounding DINO, the moving subject
    execution/        jobs, threads, processes, Ray, failures; comparison with the dataset
    derive            Gram flow from stored features

Nothing is imported here: commands that must not load SAM2 read this stage's configuration.
"""
