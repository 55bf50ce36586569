"""Tables, pictures and tests of significance that the reports of several commands share."""
