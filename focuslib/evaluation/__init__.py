"""Score a method on a data set through lmms-eval, with every answer journalled."""
