"""What distill and sort share: objectives, teachers, the training loop."""
