; Rows of 256 bytes loaded into LDS in two halves, by loads that write 64 x 16 bytes in one piece.
; The hardware puts lane l at M0 + 16 l: eight half rows lie 128 bytes apart. The kernel sets the second half down at
; +128 as if rows were 256 bytes apart, on top of the next rows' first halves, and reads it back the same way.
	.amdgcn_target "amdgcn-amd-amdhsa--gfx950"
	.type	lds_rows,@function
lds_rows:                                  ; arguments: input, output (f32 or dwords)
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0            ; v1 = 4 * work-item
	v_lshrrev_b32_e32 v2, 6, v0            ; v2 = wave
	v_and_b32_e32 v3, 63, v0               ; v3 = lane
	s_waitcnt lgkmcnt(0)
	s_mov_b32 s8, s4
	s_mov_b32 s9, s5
	s_mov_b32 s10, 2048
	s_mov_b32 s11, 0x27000
	v_lshrrev_b32_e32 v4, 3, v3            ; row of this lane
	v_and_b32_e32 v5, 7, v3                ; 16-byte block in the half row
	v_lshlrev_b32_e32 v6, 8, v4
	v_lshl_add_u32 v6, v5, 4, v6           ; global: row * 256 + block * 16
	s_mov_b32 m0, 0
	s_nop 0
	buffer_load_dwordx4 v6, s[8:11], 0 offen lds
	s_movk_i32 s12, 0x80
	s_movk_i32 s13, 0x80                   ; FIX: s_movk_i32 s13, 0x400
	s_mov_b32 m0, s13
	s_nop 0
	buffer_load_dwordx4 v6, s[8:11], s12 offen lds
	s_waitcnt vmcnt(0)
	s_barrier
	; lane l reads the second half of row l / 8
	s_movk_i32 s14, 0x100                  ; FIX: s_movk_i32 s14, 0x80
	v_mul_lo_u32 v7, v4, s14
	v_lshl_add_u32 v7, v5, 4, v7
	v_add_u32_e32 v7, s13, v7
	ds_read_b128 v[8:11], v7
	v_lshlrev_b32_e32 v12, 4, v3
	s_waitcnt lgkmcnt(0)
	global_store_dwordx4 v12, v[8:11], s[6:7]
	s_endpgm
.Lfunc_end0:
	.amdhsa_kernel lds_rows
		.amdhsa_group_segment_fixed_size 2048
		.amdhsa_kernarg_size 16
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_user_sgpr_count 2
		.amdhsa_next_free_vgpr 32
		.amdhsa_next_free_sgpr 32
		.amdhsa_accum_offset 32
	.end_amdhsa_kernel
	.amdgpu_metadata
amdhsa.kernels:
  - .args:
      - .address_space:  global
        .name:           x
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .address_space:  global
        .name:           y
        .offset:         8
        .size:           8
        .value_kind:     global_buffer
    .group_segment_fixed_size: 2048
    .kernarg_segment_size: 16
    .max_flat_workgroup_size: 256
    .name:           lds_rows
    .vgpr_count:     32
	.end_amdgpu_metadata
