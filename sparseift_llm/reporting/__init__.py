"""Tables, pictures and pages made from the files of finished runs; never from a model."""
