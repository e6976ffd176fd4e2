"""Recovery: the pruned model is trained with the unpruned one as its teacher."""
