"""Students: the families of video diffusion models that stage two trains, behind one interface.

student.py         the interface: `StudentConfigs`, which each family implements in its folder
registry.py        which family a pipeline folder is of, by its model_index.json
cogvideox/, wan/   the families
hub.py, weights.py, sampler.py, official_models.py   what does not depend on the family
"""
