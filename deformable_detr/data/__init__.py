"""Images and annotations in COCO format: finding them (`places`), reading (`annotations`, `images`,
`coco`, `masks`), checking (`checks`, `picture_checks`, `split_checks`, `crowding`), converting (`voc`) and
preparing (`transforms`, `preparation`). Chapters training and your_own_data."""
