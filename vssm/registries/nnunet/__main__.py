"""Print the folder of our trainers: ``export nnUNet_extTrainer=$(python -m vssm.registries.nnunet)``."""

from vssm.registries.nnunet import trainer_folder

if __name__ == "__main__":
    print(trainer_folder())  # noqa: T201
