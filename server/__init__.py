"""The Flower side: rounds that improve a LoRA adapter on devices whose text stays where it is."""
